"""`max_grad_norm`: a step after torch's clipping, in fewer passes."""

from __future__ import annotations

import copy
import math
from typing import Any

import paired_optimizers
import pytest
import torch
from cases import (
    BLOCK,
    CASES,
    DEVICE,
    STATEFUL_CASES,
    Case,
    Tensors,
    assert_no_worse,
    assert_same_bits,
    copies_of,
    new_param,
    refused,
)
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_ as torchs

import triton_optim
from triton_optim.launch.launcher import record_launches
from triton_optim.step.conditions import StepConditions
from triton_optim.step.planning import Planning

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")
every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)
FEW = paired_optimizers.SPECS


@pytest.mark.interpreted
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


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES[::2]),
        *((case, torch.bfloat16) for case in STATEFUL_CASES),
        *((case, torch.float64) for case in STATEFUL_CASES),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_max_grad_norm_is_a_clipped_step(case: Case, dtype: torch.dtype) -> None:
    """Parameters as near to float64 as with torch's two calls; gradients are left as they are."""
    problems = [Tensors(dtype), Tensors(dtype), Tensors(dtype, torch.float64)]
    ours = case.ours(problems[0].params, max_grad_norm=2.0)
    others = [case.theirs(problem.params) for problem in problems[1:]]
    for _ in range(3):
        problems[0].new_gradients()
        before = [grad.clone() for grad in problems[0].grads]
        ours.step()
        assert_same_bits(problems[0].grads, before)
        for problem, optimizer in zip(problems[1:], others, strict=True):
            problem.new_gradients()
            for param in problem.params:
                assert param.grad is not None
                param.grad = param.grad.clone()
            norm = torchs(problem.params, 2.0)
            optimizer.step()
        torch.testing.assert_close(ours.grad_norm.double(), norm, rtol=1e-6, atol=0)
    # In float64 torch itself is the reference, and each step may add a unit.
    units = 3 if dtype == torch.float64 else 1
    one, two, three = (problem.params for problem in problems)
    assert_no_worse(one, two, three, "parameter", units)


@every_state
def test_clipping_is_one_launch_more(case: Case) -> None:
    params = [new_param(5, 7) for _ in range(50)]
    groups = [{"params": params[:20]}, {"params": params[20:], "lr": 0.003}]
    optimizer = case.ours(groups, max_grad_norm=1.0)
    for _ in range(2):
        with record_launches() as launches:
            optimizer.step()
        assert [launch.name for launch in launches] == ["norm_kernel", "multi_tensor_kernel"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_costs_one_read_of_the_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab.traffic import Traffic, watched

    from triton_optim.launch import backend, tuning

    monkeypatch.setattr(
        backend, "config", lambda variant, *_: tuning.config("sm_90", half=variant.half)
    )
    gpus = tuning.Config(1024, 4, blocks=16)
    monkeypatch.setattr(backend, "grad_config", lambda *_: gpus)
    numel = 100_000
    param = Parameter(torch.randn(numel).to(dtype))
    param.grad = torch.randn_like(param)
    moved = []
    for max_grad_norm in (None, 1.0):
        optimizer = triton_optim.RMSprop([param], max_grad_norm=max_grad_norm)
        traffic = Traffic()
        with watched(traffic.count):
            optimizer.step()
        moved.append(traffic.loaded + traffic.stored)
    extra = moved[1] - moved[0]
    assert dtype.itemsize * numel < extra < 1.02 * dtype.itemsize * numel


@every_state
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_skip_nonfinite(case: Case, value: float) -> None:
    """Also as the very first step; what follows is as if it had not been."""
    skipping, plain = (Tensors(torch.float32, specs=FEW) for _ in range(2))
    optimizer = case.ours(skipping.params, max_grad_norm=2.0, skip_nonfinite=True)
    other = case.ours(plain.params, max_grad_norm=2.0)
    for bad in (True, False, True, False):
        skipping.new_gradients()
        if bad:
            grads = skipping.grads
            before = copy.deepcopy([skipping.params, optimizer.state_dict()["state"]])
            grads[1][3] = value
            optimizer.step()
            after = [skipping.params, optimizer.state_dict()["state"]]
            assert_same_bits(before[0], after[0])
            _assert_unchanged(before[1], after[1])
        else:
            optimizer.step()
            for param, grad in zip(plain.params, skipping.grads, strict=True):
                param.grad = grad.clone(memory_format=torch.preserve_format)
            other.step()
    assert optimizer.skipped_steps == 2
    assert_same_bits(skipping.params, plain.params)
    assert_same_bits(optimizer.state_dict()["state"], other.state_dict()["state"])


def _assert_unchanged(before: dict[int, Any], after: dict[int, Any]) -> None:
    """State that was there is the same; what came is as before a first update."""
    for index, state in after.items():
        for name, value in state.items():
            if index in before:
                assert_same_bits(value, before[index][name])
            else:
                assert not value.any()


@every_state
def test_nan_spreads_without_options(case: Case) -> None:
    """As with torch: a norm of NaN makes every parameter NaN."""
    params = [new_param(5), new_param(3, 4)]
    assert params[1].grad is not None
    params[1].grad[0, 1] = math.nan
    case.ours(params, max_grad_norm=1.0).step()
    assert all(bool(param.isnan().all()) for param in params)


@every_state
def test_error_if_nonfinite_writes_nothing(case: Case) -> None:
    params = [new_param(5), new_param(3, 4)]
    optimizer = case.ours(params, max_grad_norm=1.0, error_if_nonfinite=True)
    optimizer.step()
    assert params[1].grad is not None
    params[1].grad[0, 1] = math.nan
    with refused("norm of the gradients is nan", optimizer, params):
        optimizer.step()


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_grad_norm": -1.0}, "Invalid max_grad_norm value: -1.0"),
        ({"max_grad_norm": math.nan}, "Invalid max_grad_norm value: nan"),
        ({"skip_nonfinite": True}, "give max_grad_norm too"),
        ({"error_if_nonfinite": True}, "give max_grad_norm too"),
        (
            {"max_grad_norm": 1.0, "skip_nonfinite": True, "error_if_nonfinite": True},
            "exclude one another",
        ),
    ],
)
def test_bad_options(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(triton_optim, name)([Parameter(torch.ones(1))], **kwargs)


def test_max_grad_norm_may_change() -> None:
    optimizer = triton_optim.SGD([new_param(4)], lr=1.0)
    assert optimizer.max_grad_norm is None and optimizer.grad_norm is None
    (param,) = optimizer.param_groups[0]["params"]
    for max_norm, moved in ((1.0, 1.0), (0.5, 0.5), (None, 2.0)):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.max_grad_norm = max_norm
        optimizer.step()
        assert float((param.detach() - before).norm()) == pytest.approx(moved)
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.max_grad_norm = -1.0
    assert optimizer.max_grad_norm is None


@pytest.mark.parametrize("kwargs", [{"fused": False}, {"foreach": True}], ids=str)
def test_on_torchs_own_way(kwargs: dict[str, Any]) -> None:
    """Beside parameters that the kernels take: one norm of all gradients."""
    params = [new_param(5), new_param(3, 4)]
    twins = copies_of(params)
    groups = [{"params": params[:1]}, {"params": params[1:], **kwargs}]
    optimizer = triton_optim.SGD(groups, lr=0.1, max_grad_norm=0.5)
    optimizer.step()
    norm = torchs(twins, 0.5)
    torch.optim.SGD(twins, lr=0.1, foreach=False).step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    torch.testing.assert_close(params, twins)


def test_a_sparse_gradient_has_no_norm() -> None:
    param = new_param(5)
    other = Parameter(torch.ones(4, 3, device=DEVICE))
    other.grad = torch.ones(4, 3, device=DEVICE).to_sparse(1)
    optimizer = triton_optim.SGD([param, other], max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"max_grad_norm takes no torch\.sparse_coo gradient"):
        optimizer.step()


@every_state
def test_copies_keep_the_options(case: Case) -> None:
    optimizer = case.ours([new_param(5)], max_grad_norm=0.5)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    assert other.max_grad_norm == 0.5
    assert not {"max_grad_norm", "skip_nonfinite"} & optimizer.param_groups[0].keys()
