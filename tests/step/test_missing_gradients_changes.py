"""What changes while a gradient is missing: state, options, memory, flags."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import DEVICE, Case, main_state, new_param, with_state
from embedding_tables import Tables
from torch import Tensor

import triton_optim
from triton_optim.launch.launcher import record_launches


def _emptied(value: Tensor) -> Tensor:
    value = torch.randn(value.shape, device=DEVICE)
    value.untyped_storage().resize_(0)
    return value


@with_state
@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        lambda value: value.to("meta"),
        lambda value: value.to(torch.int8),
        _emptied,
        lambda value: value.t().contiguous().t(),
    ],
    ids=["none", "offloaded", "narrowed", "emptied", "reordered"],
)
def test_state_of_a_missing_one_is_nobodys_business(case: Case, change: Any) -> None:
    """As in training block by block: it is neither checked nor moved before its next gradient."""
    params = [new_param(4, 3) for _ in range(3)]
    optimizer = case.ours(params)
    optimizer.step()
    kept = [copy.deepcopy(dict(optimizer.state[param])) for param in params[1:]]
    for param in params[1:]:
        param.grad = None
        state, name = optimizer.state[param], main_state(case)
        state[name] = change(state[name])
    changed = [optimizer.state[param][main_state(case)] for param in params[1:]]
    optimizer.step()
    params[0].data = params[0].data.clone()  # so that a plan is made anew
    optimizer.step()
    for param, state, held in zip(params[1:], kept, changed, strict=True):
        assert optimizer.state[param][main_state(case)] is held
        optimizer.state[param].update(state)
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_an_option_switched_on_for_what_is_missing() -> None:
    params = [new_param(5) for _ in range(2)]
    optimizer = triton_optim.RMSprop([{"params": [param]} for param in params])
    optimizer.step()
    params[1].grad = None
    optimizer.param_groups[1]["momentum"] = 0.9
    optimizer.step()
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(RuntimeError, match="momentum_buffer' of parameter 0 of group 1 is missing"):
        optimizer.step()


def test_two_parameters_over_one_memory_in_turn() -> None:
    """What would be refused together is not, where one has no gradient."""
    params = [new_param(5), new_param(5)]
    params[1].data = params[0].data
    start = params[0].detach().clone()
    optimizer = triton_optim.SGD(params, lr=1.0)
    for step in range(4):
        params[step % 2].grad = torch.ones_like(params[0])
        params[1 - step % 2].grad = None
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), start - 4)
    params[0].grad = params[1].grad
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_weight_decay_switched_on_while_a_sparse_gradient_is_missing(name: str) -> None:
    """Its next gradient falls back to torch, whose error it gets, and no row is updated."""
    tables, dense = Tables([(9, 4)]), new_param(3, dtype=torch.float64)
    (table,) = tables.params
    optimizer = getattr(triton_optim, name)([table, dense], lr=0.1)
    for decay in (0.0, 0.5):
        optimizer.param_groups[0]["weight_decay"] = decay
        table.grad = None
        optimizer.step()
        tables.new_gradients([4])
        if decay == 0:
            optimizer.step()
    before = table.detach().clone()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch.equal(table, before)


@pytest.mark.parametrize("fused", [None, True])
def test_flags_changed_while_a_gradient_is_missing(fused: bool | None) -> None:
    params = [new_param(5), new_param(3)]
    optimizer = triton_optim.SGD(params, fused=False)
    optimizer.step()
    grad, params[1].grad = params[1].grad, None
    optimizer.param_groups[0]["fused"] = fused
    optimizer.step()
    params[1].grad = grad
    with record_launches() as launches:
        optimizer.step()
    assert len(launches) == 1
    assert optimizer._stepper.plan is not None
    assert not optimizer._stepper.plan.has_fallback
