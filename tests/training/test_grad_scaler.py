"""`GradScaler`: unscaling and skipping inside the update, read from the device."""

from __future__ import annotations

import copy
import math
from typing import Any

import paired_optimizers
import pytest
import torch
from assertions import assert_no_worse, assert_same_bits
from cases import (
    CASES,
    DEVICE,
    STATEFUL_CASES,
    Case,
    Spec,
    Tensors,
    every_state,
    grad_of,
    new_param,
    scaled_step,
)
from cases import SPECS as ALL_SPECS
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import record_launches

INF = math.inf
SCALE = 1024.0


# Autograd leaves no gradient expanded.
SPECS = tuple(spec for spec in ALL_SPECS if spec.name != "grad-expanded")


@every_state
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("factors", [(1, INF, 1), (INF, INF, 1, 1)], ids=str)
def test_the_whole_loop(case: Case, fused: bool | None, factors: tuple[float, ...]) -> None:
    """Beside torch's optimizer, whose step the scaler skips: the first step may be skipped."""
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=2) for _ in range(2)]
    params = [Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    optimizers = [case.ours([params[0]], fused=fused), case.theirs([params[1]])]
    for factor in factors:
        for param, optimizer, scaler in zip(params, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale((param * param * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(params[0], params[1])
    assert_same_bits(scalers[0].state_dict(), scalers[1].state_dict())
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(ours, theirs, check_device=False)


@pytest.mark.parametrize(
    ("case", "storage"),
    [
        *((case, torch.float32) for case in CASES[::3]),
        *((case, torch.float16) for case in STATEFUL_CASES),
        *((case, torch.bfloat16) for case in STATEFUL_CASES),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_unscaling_in_the_update(case: Case, storage: torch.dtype) -> None:
    """The step and the gradients are those of gradients that were unscaled before."""
    scaled, plain = Tensors(storage, specs=SPECS), Tensors(storage, specs=SPECS)
    one, other = case.ours(scaled.params), case.ours(plain.params)
    for _ in range(3):
        for tensors in (scaled, plain):
            tensors.new_gradients()
        for grad in scaled.grads:
            grad.mul_(16.0)
        versions = [grad._version for grad in scaled.grads]
        scaled_step(one, 0.0, 16.0)
        other.step()
        assert_same_bits(scaled.grads, plain.grads)
        assert all(g._version > v for g, v in zip(scaled.grads, versions, strict=True))
    assert_same_bits(scaled.params, plain.params)
    assert_same_bits(one.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
@pytest.mark.parametrize("grad_scale", [None, SCALE])
@every_state
def test_a_skipped_step_leaves_everything(
    case: Case, grad_scale: float | None, found_inf: float
) -> None:
    tensors = Tensors(torch.float32, specs=paired_optimizers.SPECS)
    optimizer = case.ours(tensors.params)
    tensors.train(optimizer, 2)
    tensors.new_gradients()
    before = copy.deepcopy([tensors.params, tensors.grads, optimizer.state_dict()])
    with record_launches() as launches:
        scaled_step(optimizer, found_inf, grad_scale)
    assert launches
    assert_same_bits([tensors.params, tensors.grads, optimizer.state_dict()], before)
    scaled_step(optimizer, 0.0, grad_scale)
    assert not torch.equal(tensors.params[-1], before[0][-1])


@every_state
def test_a_first_step_that_is_skipped_is_none(case: Case) -> None:
    """State is as if it had not been, also in a checkpoint and after a new plan."""
    skipped, plain = (Tensors(torch.float64, specs=paired_optimizers.SPECS) for _ in range(2))
    optimizer, other = case.ours(skipped.params), case.ours(plain.params)
    skipped.new_gradients()
    scaled_step(optimizer, 1.0, None)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scaled_step(optimizer, 1.0, None)
    for tensors, opt in ((skipped, optimizer), (plain, other)):
        tensors._generator.manual_seed(1)
        for _ in range(2):
            tensors.new_gradients()
            scaled_step(opt, 0.0, None)
            tensors.params[0].grad = None
            scaled_step(opt, 0.0, None)
    assert_same_bits(skipped.params, plain.params)
    assert_same_bits(optimizer.state_dict()["state"], other.state_dict()["state"])


@every_state
def test_clipping_comes_after_unscaling(case: Case) -> None:
    specs = (Spec("a", lambda draw: draw(40, 7)), Spec("b", lambda draw: draw(5)))
    problems = [Tensors(torch.float32, specs=specs) for _ in range(2)]
    exact = Tensors(torch.float32, torch.float64, specs=specs)
    ours = case.ours(problems[0].params, max_grad_norm=1.5)
    others = [case.theirs(tensors.params) for tensors in (problems[1], exact)]
    for _ in range(3):
        problems[0].new_gradients()
        for grad in problems[0].grads:
            grad.mul_(SCALE)
        scaled_step(ours, 0.0, SCALE)
        for tensors, optimizer in zip((problems[1], exact), others, strict=True):
            tensors.new_gradients()
            norm = torch.nn.utils.clip_grad_norm_(tensors.params, 1.5)
            optimizer.step()
        torch.testing.assert_close(ours.grad_norm.double(), norm, rtol=1e-6, atol=0)
    one, two, three = (tensors.params for tensors in (*problems, exact))
    assert_no_worse(one, two, three, "parameter", specs=specs)


@pytest.mark.parametrize("kwargs", [{"fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_fallback_to_torch(kwargs: dict[str, Any], found_inf: float) -> None:
    """Beside parameters that the kernels take."""
    params = [new_param(5), new_param(3, 4)]
    groups = [{"params": params[:1]}, {"params": params[1:], **kwargs}]
    optimizer = triton_optim.SGD(groups, lr=0.5)
    grads = [param.grad.clone() for param in params if param.grad is not None]
    expected = [param - 0.5 * (1 - found_inf) * g for param, g in zip(params, grads, strict=True)]
    for param in params:
        grad_of(param).mul_(8.0)
    scaled_step(optimizer, found_inf, 8.0)
    torch.testing.assert_close(params, expected)
    factor = 8.0 if found_inf else 1.0
    torch.testing.assert_close([param.grad for param in params], [factor * g for g in grads])


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_loaded_from_torchs_default_optimizer(name: str) -> None:
    """Which knows nothing of scaling; the scaler's checks hold all the same."""
    params = [new_param(5), new_param(5)]
    theirs = getattr(torch.optim, name)([params[0]], foreach=False)
    theirs.step()
    ours = getattr(triton_optim, name)([params[1]], fused=True)
    ours.load_state_dict(theirs.state_dict())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(torch.ones((), device=DEVICE))
    before = params[1].detach().clone()
    scaler.step(ours)
    scaler.update()
    assert not torch.equal(params[1], before)


@every_state
def test_unscaled_by_hand(case: Case) -> None:
    """`unscale_`, torch's clipping, and then the step: nothing is divided twice."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
    params = [Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    ours, theirs = case.ours([params[0]]), case.theirs([params[1]])
    for _ in range(3):
        for param, optimizer in zip(params, (ours, theirs), strict=True):
            optimizer.zero_grad()
            scaler.scale((param * param).sum()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([param], 0.5)
            scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(params[0], params[1])


def test_a_scale_whose_squares_overflow() -> None:
    """The norm is that of unscaled gradients, on both routes."""
    for fused in (None, False):
        param = Parameter(torch.ones(4, device=DEVICE))
        param.grad = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE) * 2.0**70
        optimizer = triton_optim.SGD([param], lr=1.0, max_grad_norm=1.0, fused=fused)
        scaled_step(optimizer, 0.0, 2.0**70)
        torch.testing.assert_close(float(optimizer.grad_norm or 0), 30**0.5)
        expected = 1 - torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE) / 30**0.5
        torch.testing.assert_close(param.detach(), expected)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_parameter_without_elements_counts_as_the_others(found_inf: float) -> None:
    params = [new_param(0), new_param(3, dtype=torch.float64)]
    optimizer = triton_optim.RMSprop(params[:1])
    scaled_step(optimizer, found_inf, None)
    assert float(optimizer.state[params[0]]["step"]) == 1 - found_inf
