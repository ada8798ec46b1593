"""Float32 values of bfloat16 parameters: the same as in float32, whatever is done to them."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import CASES, DEVICE, SCALARS, Case, Spec, Tensors, each, every_state
from lion import Lion
from small_tensors import SMALL
from torch import Tensor
from torch.nn import Linear, Parameter

import triton_optim
from triton_optim import fp32_state_dict, load_fp32_state_dict

SMALL_AND_UNLIKE = (
    *SMALL,
    Spec("grad-unlike", lambda draw: draw(6, 11), lambda draw: draw(11, 6).t()),
)
Make = Callable[..., Any]


def joined(param: Tensor, state: dict[str, Any]) -> Tensor:
    """Bit by bit, the float32 value of a parameter."""
    high = param.detach().clone(memory_format=torch.preserve_format).view(torch.int16).int()
    remainder: Tensor = state["param_remainder"]
    return ((high << 16) + remainder.int()).view(torch.float32)


def train_both(make: Make, steps: int, specs: tuple[Spec, ...] = SMALL_AND_UNLIKE) -> None:
    """In bfloat16 with remainders, and in float32, from the same gradients."""
    exact = Tensors(torch.bfloat16, torch.float32, specs)
    ours = Tensors(torch.bfloat16, torch.bfloat16, specs)
    theirs, optimizer = make(exact.params), make(ours.params, master_weight_bits=32)
    for _ in range(steps):
        for tensors, stepped in ((exact, theirs), (ours, optimizer)):
            tensors.new_gradients()
            stepped.step()
    for p, q in zip(exact.params, ours.params, strict=True):
        state = optimizer.state[q]
        assert_same_bits(joined(q, state), p.detach())
        assert ((q - p).abs() <= p.bfloat16().abs() / 256 + 1e-30).all()
        for key, value in theirs.state[p].items():
            if isinstance(value, Tensor) and key not in SCALARS:
                assert_same_bits(state[key], value)


@each(CASES)
def test_steps_are_those_of_float32(case: Case) -> None:
    train_both(case.ours, steps=4)


@pytest.mark.interpreted
def test_those_of_ones_own_rule() -> None:
    """Compiled, it leaves the choice of which product is fused, and two kernels choose apart."""
    train_both(Lion, steps=4)


@each([case for case in CASES if "-" not in case.name])
def test_many_steps(case: Case) -> None:
    """1,000 with `HYPOTHESIS_PROFILE=soak`: what is stored is what was computed, step by step."""
    steps = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 40
    train_both(case.ours, steps, (Spec("one", lambda draw: draw(5)),))


def test_nan_and_infinities_stay_visible() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 3.38e38], device=DEVICE)
    param = Parameter(values.bfloat16())
    optimizer = triton_optim.SGD([param], lr=1.0, master_weight_bits=32)
    param.grad = torch.tensor([torch.nan, torch.inf, 1.0, -3.0e38], device=DEVICE).bfloat16()
    optimizer.step()
    assert param.isnan().tolist() == [True, False, False, False]
    assert param[1] == -torch.inf
    assert param[3] == torch.inf
    optimizer.step()
    assert param[0].isnan()
    assert param[1] == -torch.inf


def stepped(n: int = 20) -> tuple[Parameter, Any]:
    """A parameter whose values are no bfloat16, and its optimizer."""
    values = torch.linspace(1, 2, n, device=DEVICE).bfloat16()
    param = Parameter(values)
    optimizer = triton_optim.SGD([param], lr=1e-4, master_weight_bits=32)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["param_remainder"].count_nonzero() == n
    return param, optimizer


def _copy_in_place(param: Parameter) -> None:
    with torch.no_grad():
        param.copy_(torch.full_like(param, 3))


def _load_state_dict(param: Parameter) -> None:
    model = torch.nn.ParameterList([param])
    model.load_state_dict({"0": torch.full_like(param, 3)})


def _swap_in_an_average(param: Parameter) -> None:
    model = torch.nn.ParameterList([param])
    average = torch.optim.swa_utils.AveragedModel(model)
    for q in average.parameters():
        q.detach().fill_(3)
    for p, q in zip(model.parameters(), average.parameters(), strict=True):
        p.detach().copy_(q)


def _assign_data(param: Parameter) -> None:
    param.data = torch.full_like(param, 3)


WRITES = (_copy_in_place, _load_state_dict, _swap_in_an_average, _assign_data)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_parameter_that_was_written_has_no_remainder(write: Callable[..., None]) -> None:
    param, optimizer = stepped()
    write(param)
    values = fp32_state_dict(torch.nn.ParameterList([param]), optimizer)["0"]
    assert (values == 3).all()
    optimizer.step()
    assert_same_bits(
        joined(param, optimizer.state[param]), torch.full_like(param, 3).float() - 1e-4
    )


def test_only_a_parameter_that_is_stepped_is_looked_at() -> None:
    """Without a gradient it waits, and what was written stays noticed."""
    params = [stepped()[0] for _ in range(2)]
    optimizer = triton_optim.SGD(params, lr=1e-4, master_weight_bits=32)
    for _ in range(2):
        optimizer.step()
    _copy_in_place(params[0])
    grad, params[0].grad = params[0].grad, None
    optimizer.step()
    params[0].grad = grad
    optimizer.step()
    expected = torch.full_like(params[0], 3).float() - 1e-4
    assert_same_bits(joined(params[0], optimizer.state[params[0]]), expected)


def test_what_torch_does_not_count_is_off_by_half_a_unit() -> None:
    """`.data` has a counter of its own: the remainder of before is added."""
    param, optimizer = stepped()
    param.data.copy_(torch.full_like(param, 3))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (param == 3).all()
    half_a_unit = 3 * 2**-9
    assert ((joined(param, optimizer.state[param]) - 3).abs() <= half_a_unit).all()


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


def test_remainders_that_were_put_into_the_state() -> None:
    """Belong to their parameters, wherever in memory those of before lay."""
    params = [stepped()[0] for _ in range(20)]
    optimizer = triton_optim.SGD(params, lr=1e-4, master_weight_bits=32)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    expected = [joined(param, optimizer.state[param]) for param in params]
    values = [param.detach().clone() for param in params]
    optimizer.step()
    for i, (param, value) in enumerate(zip(params, values, strict=True)):
        with torch.no_grad():
            param.copy_(value)
        # as ZeroRedundancyOptimizer does
        optimizer.state[param] = {key: state.clone() for key, state in saved[i].items()}
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits([joined(param, optimizer.state[param]) for param in params], expected)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_written_parameter_is_saved_without_a_remainder(how: str) -> None:
    param, optimizer = stepped()
    _copy_in_place(param)
    if how == "state_dict":
        copied, other = stepped()
        _copy_in_place(copied)
        other.load_state_dict(optimizer.state_dict())
    elif how == "deepcopy":
        copied, other = copy.deepcopy((param, optimizer))
    else:
        copied, other = pickle.loads(pickle.dumps((param, optimizer)))
    copied.grad = torch.zeros_like(copied)
    other.step()
    assert (joined(copied, other.state[copied]) == 3).all()


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
