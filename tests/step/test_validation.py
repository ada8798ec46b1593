"""Errors name the parameter, and nothing has been written."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same_bits, raises
from cases import BLOCK, DEVICE, Case, every_state, grad_of, main_state, new_param, with_state
from torch.nn import Parameter

import triton_optim
from triton_optim.step import validation


def test_rmsprop_refuses_sparse_gradients() -> None:
    dense, other = new_param(4), new_param(4, 3)
    other.grad = torch.ones(4, 3, device=DEVICE).to_sparse(1)
    optimizer = triton_optim.RMSprop([dense, other])
    with raises("RMSprop does not support sparse gradients", optimizer, [dense, other]):
        optimizer.step()
    assert dense not in optimizer.state


def test_rprop_takes_two_step_sizes() -> None:
    params = [new_param(4), new_param(5)]
    before = copy.deepcopy(params)
    optimizer = triton_optim.Rprop([{"params": [param]} for param in params])
    optimizer.param_groups[0].update(etas=(0.5,), step_sizes=(1e-6, 1.0, 50.0))
    with pytest.raises(ValueError, match="not enough values to unpack"):
        optimizer.step()
    assert_same_bits(params, before)
    assert not optimizer.state


@every_state
@pytest.mark.parametrize("kind", ["sparse", "strided", "subclass"])
def test_fused_true_where_there_is_no_kernel(case: Case, kind: str) -> None:
    class Subclass(Parameter):
        pass

    fine, param = new_param(4), new_param(6, 4)
    if kind == "sparse":
        param.grad = torch.ones(6, 4, device=DEVICE).to_sparse(2)
    elif kind == "strided":
        param = Parameter(torch.randn(6, 8, device=DEVICE)[:, ::2])
        param.grad = torch.ones(6, 4, device=DEVICE)
    else:
        param = Subclass(param.data)
        param.grad = torch.ones(6, 4, device=DEVICE)
    optimizer = case.ours([fine, param], fused=True)
    message = r"`fused=True`.*parameter 1 of group 0.*leave `fused`"
    with raises(message, optimizer, [fine, param]):
        optimizer.step()


@pytest.mark.parametrize("step", [None, 3, torch.zeros(2), torch.zeros((), dtype=torch.cfloat)])
def test_bad_step(step: Any) -> None:
    param = new_param(5)
    optimizer = triton_optim.RMSprop([param])
    optimizer.step()
    optimizer.state[param]["step"] = step
    with raises("'step' of parameter 0 of group 0", optimizer, [param]):
        optimizer.step()


@every_state
@pytest.mark.parametrize("fused", [None, False])
def test_gradient_of_another_shape_forced_through_data(case: Case, fused: bool | None) -> None:
    """A slice has the address that the whole gradient had; torch would broadcast an element."""
    params = [new_param(5), new_param(BLOCK + 1)]
    optimizer = case.ours(params, fused=fused)
    optimizer.step()
    for length in (BLOCK, 1):
        grad_of(params[1]).data = grad_of(params[1]).data[:length]
        with raises("gradient of parameter 1 of group 0", optimizer, params):
            optimizer.step()


def test_gradient_on_another_device() -> None:
    """The check alone: between a CPU and the meta device no tensor can be moved in place."""
    grad = torch.empty(3, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"gradient of parameter 1 is \(3, 4\) on meta"):
        validation.check_tensors(new_param(3, 4), grad, "parameter 1")


@every_state
def test_a_parameter_turned_meta(case: Case) -> None:
    params = [new_param(5), new_param(3, 4)]
    optimizer = case.ours([("a", params[0]), ("b", params[1])])
    optimizer.step()
    meta = Parameter(torch.empty(3, 4, device="meta"))
    meta.grad = torch.empty_like(meta)
    torch.utils.swap_tensors(params[1], meta)
    with raises(r"parameter 1 \('b'\) of group 0 is on the meta", optimizer, params[:1]):
        optimizer.step()


@every_state
def test_a_parameter_that_shrinks_at_its_address(case: Case) -> None:
    """Its old gradient is still there, and the kernel must not follow it past the end."""
    param = new_param(BLOCK + 1)
    optimizer = case.ours([param])
    optimizer.step()
    whole = param.data
    param.data = param.data[:3]
    with raises("gradient of parameter 0 of group 0", optimizer, [whole]):
        optimizer.step()


@with_state
def test_state_that_shrinks_at_its_address(case: Case) -> None:
    param = new_param(BLOCK + 1)
    optimizer = case.ours([param])
    optimizer.step()
    for key, value in optimizer.state[param].items():
        if key != "step":
            value.data = value.data[:3]
    with raises(r"of parameter 0 of group 0 has shape \(3,\)", optimizer, [param]):
        optimizer.step()


@every_state
def test_an_expanded_parameter(case: Case) -> None:
    """torch notices too, but only when it has stepped what stands before."""
    params = [new_param(3), Parameter(torch.ones(1, 5, device=DEVICE).expand(4, 5))]
    params[1].grad = torch.ones(4, 5, device=DEVICE)
    optimizer = case.ours(params)
    with raises("parameter 1 of group 0 is expanded", optimizer, params):
        optimizer.step()


@every_state
@pytest.mark.parametrize("start", [0, BLOCK - 1])
@pytest.mark.parametrize("first", [True, False])
def test_parameters_that_share_memory(case: Case, start: int, first: bool) -> None:
    memory = torch.randn(2 * BLOCK, device=DEVICE)
    params = [new_param(BLOCK), new_param(3), new_param(BLOCK)]
    optimizer = case.ours([{"params": params[:1]}, {"params": params[1:]}])
    if not first:
        optimizer.step()
    params[0].data, params[2].data = memory[:BLOCK], memory[start : start + BLOCK]
    message = "parameter 0 of group 0 and parameter 1 of group 1 share memory"
    with raises(message, optimizer, params):
        optimizer.step()
    params[2].data = memory[BLOCK:]
    optimizer.step()


@with_state
@pytest.mark.parametrize("transposed", [False, True])
def test_state_that_is_shared(case: Case, transposed: bool) -> None:
    name = main_state(case)
    params = [new_param(5, 5), new_param(5, 5)]
    optimizer = case.ours(params)
    optimizer.step()
    shared = optimizer.state[params[0]][name]
    for param in params:
        optimizer.state[param][name] = shared.t() if transposed else shared
    message = (
        f"'{name}' of parameter 0 of group 0 and state '{name}' of parameter 1 of group 0 share"
    )
    with raises(message, optimizer, params):
        optimizer.step()


@every_state
@pytest.mark.parametrize("value", ["0.1", b"1", [0.1], None], ids=repr)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_rate_that_is_no_number(case: Case, value: Any, stepped: bool) -> None:
    param = new_param(5)
    optimizer = case.ours([param])
    if stepped:
        optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = value
    tensors = [param.detach(), *optimizer.state.get(param, {}).values()]
    before = copy.deepcopy(tensors)
    with pytest.raises(TypeError, match=r"lr of group 0 is .*; give it a number"):
        optimizer.step()
    assert_same_bits(tensors, before)
    for number in (np.float32(0.1), np.int64(1), True, torch.tensor(0.1), rate):
        optimizer.param_groups[0]["lr"] = number
        optimizer.step()


@pytest.mark.parametrize("fused", [None, False])
def test_a_rate_of_two_elements(fused: bool | None) -> None:
    param = new_param(5)
    optimizer = triton_optim.SGD([{"params": [new_param(3)]}, {"params": [param]}], fused=fused)
    optimizer.param_groups[1]["lr"] = torch.ones(2)
    before = param.detach().clone()
    with pytest.raises(ValueError, match="lr of group 1 has 2 elements; give it a number, or a"):
        optimizer.step()
    assert_same_bits(param.detach(), before)


@pytest.mark.parametrize(
    ("option", "name"), [({"momentum": 0.9}, "momentum_buffer"), ({"centered": True}, "grad_avg")]
)
def test_an_option_of_rmsprop_switched_on_later(option: dict[str, Any], name: str) -> None:
    """The error says what changed; torch's is a KeyError."""
    param = new_param(5)
    optimizer = triton_optim.RMSprop([param])
    optimizer.step()
    optimizer.param_groups[0].update(option)
    (flag,) = option
    message = rf"state '{name}' of parameter 0 of group 0 is missing, .*\({flag}\)"
    with raises(message, optimizer, [param]):
        optimizer.step()
    optimizer.param_groups[0][flag] = 0
    optimizer.step()
    del optimizer.state[param]
    optimizer.param_groups[0].update(option)
    optimizer.step()
    assert name in optimizer.state[param]
