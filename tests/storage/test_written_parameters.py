"""Parameters that were written since the step that made their remainders."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from assertions import assert_same_bits, raises
from cases import DEVICE
from remainders import copy_in_place, joined, stepped
from torch.nn import Parameter

import triton_optim
from triton_optim import fp32_state_dict


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


WRITES = (copy_in_place, _load_state_dict, _swap_in_an_average, _assign_data)


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
    copy_in_place(params[0])
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


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_that_torch_does_not_count_stays_one(zero: float) -> None:
    """As a mask of pruning writes it: with a remainder below 0 it would become NaN."""
    param, optimizer = stepped()
    assert (optimizer.state[param]["param_remainder"] < 0).any()
    param.data.fill_(zero)
    values = fp32_state_dict(torch.nn.ParameterList([param]), optimizer)["0"]
    assert (values.abs() < 1e-38).all()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(param.detach(), torch.full_like(param, zero))
    assert (joined(param, optimizer.state[param]).abs() < 1e-38).all()


def cut(n: int) -> list[Parameter]:
    whole = torch.ones(4 * n, dtype=torch.bfloat16, device=DEVICE)
    return [Parameter(part) for part in whole.chunk(n)]


def test_parameters_that_were_cut_from_one_tensor() -> None:
    """torch counts their writes together, so that each would lose its remainder at every step."""
    message = "parameter 0 of group 0 and parameter 1 of group 0 were cut from one tensor"
    with pytest.raises(RuntimeError, match=message):
        triton_optim.SGD(cut(2), lr=1e-3, master_weight_bits=32)
    one, other = cut(2)
    optimizer = triton_optim.SGD([one], lr=1e-3, master_weight_bits=32)
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 were cut"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_only_lie_in_one_tensor() -> None:
    """As older sharding lays them: each is counted by itself, and to look counts nothing."""
    params = [Parameter(torch.ones(4, dtype=torch.bfloat16, device=DEVICE)) for _ in range(3)]
    for param, part in zip(params, cut(3), strict=True):
        param.data = part
        param.grad = torch.ones_like(param)
    optimizer = triton_optim.SGD(params[:2], lr=1e-4, master_weight_bits=32)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:]})
    for i in range(20):
        for k, param in enumerate(params):
            param.grad = torch.ones_like(param) if k == i % 3 else None
        optimizer.step()
    moved = [1 - joined(param, optimizer.state[param]) for param in params]
    expected = torch.tensor([8e-4, 8e-4, 6e-4])  # and a step of the first two
    torch.testing.assert_close(torch.stack(moved)[:, 0].cpu(), expected, rtol=1e-3, atol=0)


def test_what_was_written_is_known_after_a_checkpoint_that_does_not_fit() -> None:
    param, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["param_remainder"] = torch.zeros(3, dtype=torch.int16)
    copy_in_place(param)
    with raises("state 'param_remainder' of", optimizer, [param]):
        optimizer.load_state_dict(saved)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (joined(param, optimizer.state[param]) == 3).all()


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
    copy_in_place(param)
    if how == "state_dict":
        copied, other = stepped()
        copy_in_place(copied)
        other.load_state_dict(optimizer.state_dict())
    elif how == "deepcopy":
        copied, other = copy.deepcopy((param, optimizer))
    else:
        copied, other = pickle.loads(pickle.dumps((param, optimizer)))
    copied.grad = torch.zeros_like(copied)
    other.step()
    assert (joined(copied, other.state[copied]) == 3).all()
