"""Optimizers with state of 8 bits: steps, checkpoints, errors, and what is refused."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from assertions import assert_same_bits
from cases import DEVICE, Case, Spec, Tensors, each
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim import FusedOptimizer, Rule, StateTensor
from triton_optim.launch import backend
from triton_optim.tensors import float8
from triton_optim.tensors.float8 import GROUP_SIZE

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _large_without_gradient(param, grad, state, hyper, step, FLAGS: tl.constexpr):  # type: ignore[no-untyped-def]
    return param, (tl.where(grad == 0, 1e6, grad),)


class LargeWithoutGradient(FusedOptimizer):
    rule = Rule(
        _large_without_gradient, state=(StateTensor("buffer"),), hyperparameters={"lr": 0.1}
    )


def test_what_is_not_there_has_no_say() -> None:
    """In a group that a tensor does not fill."""
    param = Parameter(torch.ones(5, device=DEVICE))
    optimizer = LargeWithoutGradient([param], state_dtype="8bit")
    param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    torch.testing.assert_close(state["buffer"].float(), param.grad, rtol=0.13, atol=0)


SPECS = (
    Spec("0-dim", lambda draw: draw()),
    Spec("empty", lambda draw: draw(0)),
    Spec("groups", lambda draw: draw(2 * GROUP_SIZE + 5)),
    Spec("misaligned", lambda draw: draw(301)[1:], lambda draw: draw(300)),
    Spec("transposed", lambda draw: draw(30, 10).t(), lambda draw: draw(30, 10).t()),
    Spec("grad-unlike", lambda draw: draw(6, 11), lambda draw: draw(11, 6).t()),
)
EIGHT_BIT_CASES = (
    Case("adamw", "AdamW", {"lr": 0.01}),
    Case("adagrad", "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}),
    Case("rmsprop", "RMSprop", {"lr": 0.01, "momentum": 0.9}),
    Case("sgd", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    Case("adamax", "Adamax", {"lr": 0.01}),
)


@each(EIGHT_BIT_CASES)
@pytest.mark.parametrize(
    ("storage", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"master_weight_bits": 32}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.float16, {"stochastic_rounding": True}),
        (torch.float64, {}),
    ],
    ids=str,
)
def test_a_step_is_that_of_float32_rounded(
    case: Case, storage: torch.dtype, options: dict[str, Any]
) -> None:
    """From the same state: within a unit of the eighth of what is large in its group."""
    ours, exact = Tensors(storage, storage, SPECS), Tensors(storage, torch.float64, SPECS)
    optimizer = case.ours(ours.params, state_dtype="8bit", **options)
    reference = case.theirs(exact.params)
    for _ in range(3):
        for tensors, stepped in ((ours, optimizer), (exact, reference)):
            tensors.new_gradients()
            stepped.step()
        states = optimizer.state_dict()["state"]
        for i, (p, q) in enumerate(zip(ours.params, exact.params, strict=True)):
            for name, right in reference.state[q].items():
                value = states[i].get(name)
                if value is None or not value.ndim or name == "step":
                    continue
                assert value.dtype == torch.bfloat16
                largest = right.abs().amax() if right.numel() else torch.tensor(0.0)
                error = (value.double() - right).abs()
                assert (error <= right.abs() / 7 + largest * 2**-17 + 2**-120).all(), name
                right.copy_(value)
            q.data.copy_(p.data)


@each(EIGHT_BIT_CASES)
def test_saved_and_resumed_to_the_bit(case: Case) -> None:
    options = {"master_weight_bits": 32, "state_dtype": "8bit"}
    tensors = Tensors(torch.bfloat16, torch.bfloat16, SPECS)
    optimizer = case.ours(tensors.params, **options)
    tensors.train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    copied = copy.deepcopy(tensors)
    other = case.ours(copied.params, **options)
    other.load_state_dict(copy.deepcopy(saved))
    assert_same_bits(other.state_dict(), saved)
    again, deep = copy.deepcopy((tensors, optimizer))
    for t, o in ((tensors, optimizer), (copied, other), (again, deep)):
        t.train(o, 2)
    for t, o in ((copied, other), (again, deep)):
        assert_same_bits([p.detach() for p in t.params], [p.detach() for p in tensors.params])
        assert_same_bits(o.state_dict(), optimizer.state_dict())
    theirs = case.theirs(tensors.params)
    theirs.load_state_dict(copy.deepcopy(saved))  # as bfloat16 state, which torch goes on with
    tensors.train(theirs, 1)


def test_what_a_hook_puts_into_the_state() -> None:
    """Before it is saved: it stays there."""
    param = Parameter(torch.ones(5, device=DEVICE))
    optimizer = triton_optim.AdamW([param], state_dtype="8bit")
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.register_state_dict_pre_hook(lambda o: o.state[param].update(mine=7))
    (saved,) = optimizer.state_dict()["state"].values()
    assert saved["mine"] == optimizer.state[param]["mine"] == 7
    assert saved["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8


def test_checkpoints_of_float32_state() -> None:
    tensors = Tensors(torch.float32, torch.float32, SPECS)
    reference = torch.optim.AdamW(tensors.params)
    tensors.train(reference, 2)
    optimizer = triton_optim.AdamW(tensors.params, state_dtype={"exp_avg_sq": "8bit"})
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for param in tensors.params:
        state, right = optimizer.state[param], reference.state[param]
        assert_same_bits(state["exp_avg"], right["exp_avg"])
        values = float8.decode(
            state["exp_avg_sq"], state["exp_avg_sq_exponents"], is_denominator=True
        )
        torch.testing.assert_close(values.float(), right["exp_avg_sq"], rtol=2**-4, atol=0)
    tensors.train(optimizer, 1)


def test_the_sum_of_adagrad_is_right_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 0.5 % after 10,000 steps with `HYPOTHESIS_PROFILE=soak`; without, after 40."""
    draw = torch.Generator().manual_seed(0)
    n, steps = (2048, 10_000) if SOAK else (512, 40)
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (n,))
    scales = torch.exp(0.5 * torch.randn(n, generator=draw))
    param = Parameter(torch.zeros(n, device=DEVICE))
    optimizer = triton_optim.Adagrad([param], lr=1e-3, state_dtype="8bit")
    exact = torch.zeros(n, dtype=torch.float64)
    for step in range(1, steps + 1):
        grad = torch.randn(n, generator=draw) * scales
        param.grad = grad.to(DEVICE)
        exact += grad.double() ** 2
        optimizer.step()
        if step in (40, 2000, 10_000):
            state = optimizer.state_dict()["state"][0]["sum"].double().cpu()
            ratio = state / exact
            print(f"after {step}: mean {ratio.mean() - 1:+.2%}, rms {(ratio - 1).std():.3f}")
            deviation = float((ratio - 1).std()) / n**0.5
            assert abs(float(ratio.mean()) - 1) < max(0.005, 4 * deviation)
            assert (state > 0).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "largest"),
    [
        ("AdamW", {"weight_decay": 0.0}, 0.13),
        ("RMSprop", {}, 0.095),
        ("Adagrad", {}, 0.12),
        ("SGD", {"momentum": 0.9}, 0.085),
        ("Lion", {"weight_decay": 0.0}, 0.4),  # of signs, some of which turn
    ],
)
def test_the_error_of_an_update(
    name: str, kwargs: dict[str, Any], largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root mean square, over that of the update from float32 state; after some steps, or 2,000."""
    n, steps = 2048, 2000 if SOAK else 60
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (n,))
    draw = torch.Generator().manual_seed(0)
    scales = torch.exp(0.5 * torch.randn(n, generator=draw))
    params = [Parameter(torch.zeros(n, device=DEVICE)) for _ in range(2)]
    make = getattr(triton_optim, name)
    optimizers = [make(params[:1], **kwargs), make(params[1:], state_dtype="8bit", **kwargs)]
    errors, sizes = 0.0, 0.0
    for step in range(steps):
        grad = (torch.randn(n, generator=draw) * scales).to(DEVICE)
        updates = []
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad, before = grad.clone(), param.detach().double()
            optimizer.step()
            updates.append(param.detach().double() - before)
        if step >= steps // 2:
            errors += float((updates[1] - updates[0]).square().mean())
            sizes += float(updates[0].square().mean())
    print(f"{name}: {(errors / sizes) ** 0.5:.4f}")
    assert (errors / sizes) ** 0.5 < largest


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (triton_optim.ASGD, {}, "not enough for the state 'ax'"),
        (triton_optim.Rprop, {}, "not enough for the state 'step_size'"),
        (triton_optim.RMSprop, {"centered": True}, "not enough for the state 'grad_avg'"),
        (triton_optim.AdamW, {"stochastic_rounding": False}, "leave it out, or ask for bfloat16"),
    ],
)
def test_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([Parameter(torch.zeros(3, device=DEVICE))], state_dtype="8bit", **options)


def _short(state: dict[str, Tensor]) -> None:
    state["exp_avg_exponents"] = state["exp_avg_exponents"][:1].clone()


def _missing(state: dict[str, Tensor]) -> None:
    del state["exp_avg_exponents"]


def _not_codes(state: dict[str, Tensor]) -> None:
    state["exp_avg"] = state["exp_avg"].float()


def _another_order(state: dict[str, Tensor]) -> None:
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_short, r"torch.uint8 of shape \(1,\) on .*, not torch.uint8 of \(2,\)"),
        (_missing, "state 'exp_avg_exponents' of .* is None"),
        (_not_codes, "is torch.float32, and the optimizer's options ask for torch.uint8"),
        (_another_order, "lies in memory in another order"),
    ],
)
def test_codes_and_exponents_that_do_not_fit(change: Any, message: str) -> None:
    param = Parameter(torch.zeros(20, 20, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = triton_optim.AdamW([param], state_dtype="8bit")
    optimizer.step()
    change(optimizer.state[param])
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same_bits(param.detach(), before)
