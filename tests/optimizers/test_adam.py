"""Adam and AdamW, beyond what the table of cases has: bias, betas, checkpoints, mistakes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from assertions import raises
from cases import DEVICE, Case, new_param
from paired_optimizers import Pair
from reference import Reference
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend

ADAMW = Case("adamw", "AdamW", {"lr": 0.01, "weight_decay": 0.1})


def test_decoupled_decay_has_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32(1 - lr * weight_decay) is off by the same in every step; our error is rounding."""
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (4096,))
    values = torch.rand(4096, dtype=torch.float64).add_(1).float().to(DEVICE)
    params = [Parameter(values.clone()) for _ in range(2)]
    kwargs = {"lr": 1e-3, "weight_decay": 0.01}
    optimizers = [ADAMW._replace(kwargs=kwargs).ours([params[0]])]
    optimizers += [ADAMW._replace(kwargs=kwargs).theirs([params[1]])]
    exact = Reference("AdamW", values.double(), **kwargs)
    for _ in range(100):
        grad = torch.randn_like(values)
        exact.step(grad)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    ours, theirs = (exact.rms_error(param) for param in params)
    assert ours < theirs / 3


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.9), (0.95, 0.99999)], ids=str)
def test_betas(betas: tuple[float, float]) -> None:
    Pair(Case("adam", "Adam", {"betas": betas})).step(3)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_betas_and_weight_decay_as_tensors(shape: tuple[int, ...]) -> None:
    """Changed in place between steps, as torch reads them."""
    values = [torch.full(shape, value, dtype=torch.float64) for value in (0.8, 0.99)]
    values.append(torch.tensor(0.1, dtype=torch.float64))  # torch takes no other shape
    kwargs = {"betas": tuple(values[:2]), "weight_decay": values[2]}
    pair = Pair(Case("adam", "Adam", kwargs))
    # torch 2.7 takes no other shape
    pair.optimizers[1].param_groups[0]["betas"] = tuple(value.view(()) for value in values[:2])
    pair.step(2)
    for value in values:
        value.mul_(0.5)
    pair.step(2)


def test_betas_in_a_list_that_is_edited() -> None:
    pair = Pair(ADAMW)
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["betas"] = [0.8, 0.99]
    pair.step(2)
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["betas"][0] = 0.3
    pair.step(2)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("by", ["ours", "theirs"])
def test_checkpoints_of_a_fused_step(name: str, by: str) -> None:
    """In mid-run, into one that is not fused, which takes its groups, and back."""
    case = Case("adam", name, {"lr": 0.01, "amsgrad": True})
    pair = Pair(case)
    pair.step(2)
    source = getattr(case, by)(pair.tensors[0].params, foreach=None, fused=True)
    saved = copy.deepcopy(pair.optimizers[0].state_dict())
    saved["param_groups"][0].update(foreach=None, fused=True)
    source.load_state_dict(saved)
    pair.tensors[0].new_gradients()
    source.step()
    pair.optimizers[0].load_state_dict(source.state_dict())
    assert pair.optimizers[0].param_groups[0]["fused"] is True
    pair.tensors[1].train(pair.optimizers[1], 1)
    pair.check()
    pair.step(2)


def test_adams_checkpoint_in_adamw() -> None:
    """Its groups replace AdamW's, whose decay stays decoupled, as torch's."""
    source = Pair(Case("adam", "Adam", {"lr": 0.01, "weight_decay": 0.1}))
    target = Pair(ADAMW)
    source.step(2)
    for saved, optimizer in zip(source.optimizers, target.optimizers, strict=True):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    target.step(2)


def test_a_parameter_far_on() -> None:
    """Steps are a parameter's own: of a checkpoint, one far on and one that is new."""
    pair = Pair(Case("adam", "Adam", {"lr": 0.01}))
    pair.step(1)

    def far_on(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> None:
        checkpoint = copy.deepcopy(optimizer.state_dict())
        checkpoint["state"][0]["step"] = torch.tensor(99_999.0)
        del checkpoint["state"][1]
        optimizer.load_state_dict(checkpoint)

    pair.each(far_on)
    pair.step(2)
    assert pair.optimizers[0].state[pair.tensors[0].params[0]]["step"] == 100_001


def test_amsgrad_switched_on_in_mid_run() -> None:
    param = new_param(3)
    optimizer = triton_optim.Adam([param])
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with raises("'max_exp_avg_sq' of parameter 0 of group 0 is missing", optimizer, [param]):
        optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.step()


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (float("nan"), 0.9)], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_of_a_group(name: str, betas: tuple[float, float]) -> None:
    """torch checks the optimizer's alone, and divides by zero."""
    make = getattr(triton_optim, name)
    with pytest.raises(ValueError, match="Invalid beta parameter at index"):
        make([{"params": [new_param(2)], "betas": betas}])
    optimizer = make([param := new_param(2)])
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match="Invalid beta parameter at index"):
        optimizer.step()
    assert torch.equal(param, before)


def test_hyperparameters_that_stay_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuple of betas cannot change; a list can."""
    optimizer = triton_optim.Adam([new_param(2)])
    computed: list[Any] = []
    values = type(optimizer.rule).values

    def counted(*args: Any) -> Any:
        computed.append(args)
        return values(*args)

    monkeypatch.setattr(type(optimizer.rule), "values", counted)
    optimizer.step()
    computed.clear()
    optimizer.step()
    assert not computed
    optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    optimizer.step()
    optimizer.step()
    assert len(computed) == 2
