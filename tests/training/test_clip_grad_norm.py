"""`clip_grad_norm_`: torch's function, in fewer passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from assertions import assert_no_worse, assert_same_bits
from cases import (
    BLOCK,
    DEVICE,
    DTYPES,
    SPECS,
    Spec,
    Tensors,
    copies_of,
    double,
    grad_of,
    interpreted,
    new_param,
)
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_ as torchs

import triton_optim
from triton_optim import clip_grad_norm_
from triton_optim.launch import chunking
from triton_optim.launch.launcher import record_launches
from triton_optim.step.conditions import StepConditions
from triton_optim.step.planning import Planning

# Gradients that lie dense in memory; torch's function is what clips the others.
DENSE = tuple(spec for spec in SPECS if spec.name != "grad-expanded")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf, 0.0])
def test_clip_grad_norm_is_torchs(dtype: torch.dtype, max_norm: float) -> None:
    """Both as near to float64 as torch: the norm, and what becomes of the gradients."""
    ours, theirs = Tensors(dtype, specs=DENSE), Tensors(dtype, specs=DENSE)
    exact = Tensors(dtype, double(dtype), specs=DENSE)
    norms = []
    for tensors, clip in ((ours, clip_grad_norm_), (theirs, torchs), (exact, torchs)):
        tensors.new_gradients()
        norms.append(clip(tensors.params, max_norm))
    assert (norms[0].dtype, norms[0].shape) == (norms[1].dtype, norms[1].shape)
    one = (Spec("norm", lambda draw: draw()),)
    assert_no_worse(norms[:1], norms[1:2], norms[2:], "norm", specs=one)
    assert_no_worse(ours.grads, theirs.grads, exact.grads, "gradient", specs=DENSE)


def test_two_launches() -> None:
    params = [new_param(3, 5) for _ in range(60)]
    with record_launches() as launches:
        clip_grad_norm_(params, 1.0)
    assert [launch.name for launch in launches] == ["norm_kernel", "scale_kernel"]


def test_large_gradients_have_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their chunks are longer: the last program adds a sum of each."""
    monkeypatch.setattr(chunking, "MAX_PROGRAMS", 3)
    ours = [new_param(*shape) for shape in ((40 * BLOCK + 7,), (5,), (BLOCK, 9))]
    theirs = copies_of(ours)
    with record_launches() as launches:
        total = clip_grad_norm_(ours, 0.5)
    assert [launch.grid[0] for launch in launches] == [3 + len(ours) - 1] * 2
    torch.testing.assert_close(total, torchs(theirs, 0.5))
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


@interpreted
def test_nothing_is_written_where_nothing_is_clipped() -> None:
    from lab.traffic import Traffic, watched

    params = [new_param(1000), new_param(BLOCK + 1)]
    before = [param.grad.clone() for param in params if param.grad is not None]
    traffic = Traffic()
    with watched(traffic.count):
        clip_grad_norm_(params, 1e6)
    numel = 1000 + BLOCK + 1
    assert traffic.stored < 200
    assert traffic.loaded < 4 * numel + 100 * numel / BLOCK
    assert_same_bits([param.grad for param in params], before)


@pytest.mark.parametrize(
    "arguments", [{"norm_type": 1.0}, {"norm_type": math.inf}, {"foreach": False}], ids=str
)
def test_other_norms_are_torchs(arguments: dict[str, Any]) -> None:
    params = [new_param(5), new_param(3, 4)]
    twins = copies_of(params)
    with record_launches() as launches:
        norm = clip_grad_norm_(params, 0.5, **arguments)
    assert launches == []
    assert_same_bits(norm, torchs(twins, 0.5, **arguments))
    assert_same_bits([p.grad for p in params], [p.grad for p in twins])


def test_a_gradient_that_occurs_twice() -> None:
    params = [new_param(5)] * 2
    twins = copies_of(params[:1]) * 2
    assert_same_bits(clip_grad_norm_(params, 0.5), torchs(twins, 0.5))
    assert_same_bits(params[0].grad, twins[0].grad)


@pytest.mark.parametrize(
    ("max_norm", "error"), [(None, TypeError), (-1.0, ValueError), (math.nan, ValueError)]
)
def test_a_bad_max_norm(max_norm: Any, error: type[Exception]) -> None:
    param = new_param(5)
    before = grad_of(param).clone()
    with pytest.raises(error):
        clip_grad_norm_([param], max_norm)
    assert_same_bits(param.grad, before)


def test_gradients_that_overlap() -> None:
    base = torch.ones(9, device=DEVICE)
    params = [new_param(5), new_param(5)]
    params[0].grad, params[1].grad = base[:5], base[4:]
    with record_launches() as launches:
        clip_grad_norm_(params, 1.0)
    assert launches == []  # torch clips one after the other


def test_inside_a_compiled_program() -> None:
    param, twin = new_param(5), new_param(5)
    twin.grad = grad_of(param).clone()

    def clip() -> torch.Tensor:
        return clip_grad_norm_([param], 0.5)

    norm = torch.compile(clip, backend="eager")()
    torch.testing.assert_close(norm, torchs([twin], 0.5))
    torch.testing.assert_close(param.grad, twin.grad)


def test_nothing_to_clip() -> None:
    assert_same_bits(clip_grad_norm_([], 1.0), torchs([], 1.0))
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((param for param in list[Parameter]()), 1.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_error_if_nonfinite(value: float) -> None:
    params = [new_param(5), new_param(3, 4)]
    grad_of(params[1])[1, 2] = value
    before = [param.grad.clone() for param in params if param.grad is not None]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert_same_bits([param.grad for param in params], before)


@interpreted
def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    sizes = [7 * BLOCK + 3, 1, 5 * BLOCK, BLOCK - 1]
    grads = [torch.randn(n) * 10.0 ** (i - 2) for i, n in enumerate(sizes)]
    norms = []
    set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
    for order in (range(9), reversed(range(9)), [3, 8, 0, 4, 5, 1, 7, 2, 6]):
        turns = iter(order)

        def shuffled(builder: Any, x: int, y: int, z: int, turns: Any = turns) -> None:
            set_grid_idx(builder, next(turns), y, z)

        params = [Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer = triton_optim.SGD(params, max_grad_norm=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", shuffled)
            norms.append(_norm(optimizer))
        assert next(turns, None) is None
    assert norms[0] == norms[1] == norms[2]


def _norm(optimizer: triton_optim.SGD) -> torch.Tensor:
    """Of its gradients, and nothing is stepped."""
    plan = Planning(optimizer._fused_view()).finish()
    conditions = StepConditions.read({}, optimizer._stepper.options)
    inputs = [group.first_inputs for group in plan.launch_groups]
    plan.compile(inputs, conditions)
    plan.upload(inputs, conditions)
    return plan.grad_norm([], conditions).clone()
