"""`fp32_state_dict` and its inverse, and checkpoints that other optimizers made."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, Case, every_state
from remainders import joined, stepped
from torch.nn import Linear

import triton_optim
from triton_optim import fp32_state_dict, load_fp32_state_dict


@every_state
def test_float32_weights_there_and_back(case: Case) -> None:
    """Into another model, whose optimizer has stepped or not."""
    model = Linear(5, 3, device=DEVICE, dtype=torch.bfloat16)
    optimizer = case.ours(model.parameters(), master_weight_bits=32)
    inputs = torch.ones(2, 5, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    weights = fp32_state_dict(model, optimizer)
    assert [*weights] == ["weight", "bias"]
    for (_, param), value in zip(model.named_parameters(), weights.values(), strict=True):
        assert_same_bits(value, joined(param, optimizer.state[param]))
    for steps in (0, 1):
        other = copy.deepcopy(model).float().bfloat16()
        another = case.ours(other.parameters(), master_weight_bits=32)
        for _ in range(steps):
            other(inputs).square().sum().backward()
            another.step()
        load_fp32_state_dict(other, another, weights)
        assert_same_bits(fp32_state_dict(other, another), weights)
        assert_same_bits([*other.state_dict().values()], [*model.state_dict().values()])
        other.zero_grad()
        other(inputs).square().sum().backward()
        another.step()  # goes on from them


def test_float32_weights_of_other_parameters() -> None:
    """Float32 ones, frozen ones and buffers are as they are; a tied one comes twice."""
    half, tied = (Linear(3, 3, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    tied.weight, single = half.weight, Linear(3, 3, device=DEVICE)
    norm = torch.nn.BatchNorm1d(3, device=DEVICE)
    model = torch.nn.ModuleDict({"a": half, "b": single, "c": tied, "norm": norm})
    optimizer = triton_optim.SGD([half.weight, single.weight], master_weight_bits=32)
    weights = fp32_state_dict(model, optimizer)
    assert weights.keys() == model.state_dict().keys()
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    weights["a.weight"] = weights["c.weight"] = torch.full((3, 3), 1.001, device=DEVICE)
    load_fp32_state_dict(model, optimizer, weights)
    assert_same_bits(fp32_state_dict(model, optimizer), weights)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_fp32_state_dict(model, optimizer, {})


@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_float32_weights_that_no_step_followed_are_saved(name: str, kwargs: Any) -> None:
    """The state is remainders alone, which is as good as none."""
    models = [Linear(5, 3, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    make: Any = getattr(triton_optim, name)
    kwargs = {**kwargs, "master_weight_bits": 32}
    kwargs |= {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
    ours, other = (make(model.parameters(), **kwargs) for model in models)
    weights = {key: torch.randn_like(p.float()) for key, p in models[0].state_dict().items()}
    load_fp32_state_dict(models[0], ours, weights)
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_same_bits(fp32_state_dict(models[1], other), weights)
    for model, optimizer in zip(models, (ours, other), strict=True):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert_same_bits(other.state_dict(), ours.state_dict())


def test_float32_weights_of_two_optimizers() -> None:
    model = torch.nn.Sequential(*(Linear(3, 3, device=DEVICE) for _ in range(2)))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(torch.bfloat16)
    optimizers = [
        triton_optim.AdamW(model[0].parameters(), master_weight_bits=32),
        triton_optim.SGD(model[1].parameters(), lr=0.1, master_weight_bits=32),
    ]
    load_fp32_state_dict(model, optimizers, weights)
    assert_same_bits(fp32_state_dict(model, optimizers), weights)
    for one in optimizers:
        found = fp32_state_dict(model, one)
        assert sum(torch.equal(found[name], weights[name]) for name in weights) == 2


def test_a_model_whose_parameters_were_replaced() -> None:
    model = Linear(3, 3, device=DEVICE, dtype=torch.bfloat16)
    optimizer = triton_optim.SGD(model.parameters(), lr=0.1, master_weight_bits=32)
    copied = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(copied, assign=True)
    with pytest.raises(ValueError, match="no parameter of SGD is in the model"):
        fp32_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="no parameter of SGD is in the model"):
        load_fp32_state_dict(model, optimizer, copied)


@every_state
def test_there_and_back_through_torchs_optimizer(case: Case) -> None:
    """Which casts remainders to its parameters' dtype: they are gone then."""
    param, _ = stepped()
    ours, theirs = case.ours([param], master_weight_bits=32), case.theirs([param])
    ours.step()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    theirs.step()
    value = param.detach().clone()
    other = case.ours([param], master_weight_bits=32)
    other.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert "param_remainder" not in other.state[param]
    assert_same_bits(fp32_state_dict(torch.nn.ParameterList([param]), other)["0"], value.float())
    other.step()
    assert (joined(param, other.state[param]) != value.float()).any()


def test_float32_weights_outlive_a_first_step_that_is_skipped() -> None:
    """Where the rule forgets state of which no step was taken."""
    model = Linear(3, 2, device=DEVICE)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = triton_optim.SGD(
        model.to(torch.bfloat16).parameters(), lr=0.1, momentum=0.9, dampening=0.1,
        master_weight_bits=32, max_grad_norm=1.0, skip_nonfinite=True,
    )  # fmt: skip
    load_fp32_state_dict(model, optimizer, weights)
    for param in model.parameters():
        param.grad = torch.full_like(param, math.inf)
    optimizer.step()
    optimizer.state_dict()
    assert_same_bits(fp32_state_dict(model, optimizer), weights)
