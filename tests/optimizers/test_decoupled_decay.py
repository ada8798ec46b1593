"""`decoupled_weight_decay` of SGD, Adagrad and RMSprop, whose torch classes know L2 alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import raises
from cases import DEVICE, SPECS, Case, Tensors, new_param
from paired_optimizers import SPECS as FEW_SPECS
from reference import Reference
from torch.nn import Parameter

import triton_optim

WEIGHT_DECAY: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
every_case = pytest.mark.parametrize(
    "case",
    [
        Case("sgd", "SGD", {**WEIGHT_DECAY, "momentum": 0.9, "nesterov": True}),
        Case("adagrad", "Adagrad", {**WEIGHT_DECAY, "lr_decay": 0.5}),
        Case("rmsprop", "RMSprop", {**WEIGHT_DECAY, "momentum": 0.9, "maximize": True}),
    ],
    ids=lambda case: case.name,
)


@every_case
def test_the_equation(case: Case) -> None:
    tensors = Tensors(torch.float64)
    kwargs = {**case.kwargs, "decoupled_weight_decay": True}
    exact = [Reference(case.optimizer, param, **kwargs) for param in tensors.params]
    optimizer = case.ours(tensors.params, decoupled_weight_decay=True, fused=True)
    for _ in range(4):
        tensors.new_gradients()
        for reference, param in zip(exact, tensors.params, strict=True):
            assert param.grad is not None
            reference.step(param.grad)
        optimizer.step()
    for spec, param, reference in zip(SPECS, tensors.params, exact, strict=True):
        assert reference.error(param) <= 16 * reference.unit(), spec.name


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}], ids=str)
@every_case
def test_the_fallback_decays_so_too(case: Case, options: dict[str, Any]) -> None:
    runs = [Tensors(torch.float64, specs=FEW_SPECS) for _ in range(2)]
    kernels = case.ours(runs[0].params, decoupled_weight_decay=True)
    fallback = case.ours(runs[1].params, decoupled_weight_decay=True, **options)
    for tensors, optimizer in zip(runs, (kernels, fallback), strict=True):
        tensors.train(optimizer, 3)
    torch.testing.assert_close(runs[0].params, runs[1].params, rtol=1e-12, atol=1e-12)
    assert fallback.param_groups[0]["weight_decay"] == 0.1


@every_case
def test_state_dicts_are_torchs(case: Case) -> None:
    params = [new_param(5)]
    optimizer, torchs = case.ours(params, decoupled_weight_decay=True), case.theirs(params)
    optimizer.step()
    torchs.step()
    ours, theirs = optimizer.state_dict(), torchs.state_dict()
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    assert ours["state"][0].keys() == theirs["state"][0].keys()
    torchs.load_state_dict(ours)
    optimizer.load_state_dict(torchs.state_dict())
    optimizer.step()
    assert optimizer.defaults["decoupled_weight_decay"] is True


@every_case
def test_it_is_for_the_whole_optimizer(case: Case) -> None:
    with pytest.raises(ValueError, match="decoupled_weight_decay is for the whole optimizer"):
        case.ours([{"params": [new_param(2)], "decoupled_weight_decay": True}])


def test_a_decay_that_is_a_tensor() -> None:
    param = Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.zeros_like(param)
    weight_decay = torch.tensor(0.5)
    optimizer = triton_optim.SGD(
        [param], lr=0.5, weight_decay=weight_decay, decoupled_weight_decay=True
    )
    optimizer.step()
    weight_decay.fill_(1.0)
    optimizer.step()
    assert param.tolist() == [0.375] * 3


def test_a_step_of_torchs_that_raises_decays_nothing() -> None:
    dense, sparse = new_param(4), new_param(4, 3)
    sparse.grad = torch.ones(4, 3, device=DEVICE).to_sparse(1)
    optimizer = triton_optim.RMSprop([dense, sparse], **WEIGHT_DECAY, decoupled_weight_decay=True)
    with raises("RMSprop does not support sparse gradients", optimizer, [dense, sparse]):
        optimizer.step()


@every_case
def test_a_rate_of_shape_1_and_a_parameter_without_dims(case: Case) -> None:
    runs = [Parameter(torch.ones((), device=DEVICE)) for _ in range(2)]
    for param, fused in zip(runs, (None, False), strict=True):
        param.grad = torch.ones_like(param)
        optimizer = case.ours(
            [param], lr=torch.tensor([0.1]), decoupled_weight_decay=True, fused=fused
        )
        optimizer.step()
    torch.testing.assert_close(*runs)
