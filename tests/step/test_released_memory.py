"""Memory that is taken from an optimizer is free at once: nothing of ours holds it."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE, STATEFUL_CASES, Case, every_state, grad_of, new_param
from embedding_tables import SPARSE_CASES
from torch import Tensor, nn
from torch.nn import Parameter

from triton_optim import step_in_backward

Change = Callable[[Any], None]

ROWWISE = Case("rowwise", "RowwiseAdagrad", {"lr": 0.1})
FALLBACK = Case("fallback", "RMSprop", {"fused": False})
every_kind = pytest.mark.parametrize(
    "case",
    [*STATEFUL_CASES, SPARSE_CASES[2]._replace(name="sparse"), ROWWISE, FALLBACK],
    ids=lambda case: case.name,
)


def _clear(optimizer: Any) -> None:
    optimizer.state.clear()


def _new_dict(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def _pop(optimizer: Any) -> None:
    for param in optimizer.param_groups[1]["params"]:
        optimizer.state.pop(param, None)


def _empty(optimizer: Any) -> None:
    for param in optimizer.param_groups[1]["params"]:
        optimizer.state.get(param, {}).clear()


def _delete_group(optimizer: Any) -> None:
    _pop(optimizer)
    del optimizer.param_groups[1]


def _replace(optimizer: Any) -> None:
    """As densification does."""
    group = optimizer.param_groups[1]
    (param,) = group["params"]
    state = optimizer.state.pop(param, {})
    longer = Parameter(torch.cat([param.detach(), param.detach()]))
    group["params"][0] = longer
    if state:
        optimizer.state[longer] = {
            key: value if key == "step" else torch.cat([value, value])
            for key, value in state.items()
        }


def _optimizer(case: Case) -> tuple[Any, list[weakref.ref[Tensor]], list[weakref.ref[Tensor]]]:
    """After two steps, with references to the state and the parameter of its second group."""
    params = [new_param(4, 3) for _ in range(3)]
    if case.name == "sparse":
        for param in params:
            param.grad = grad_of(param).to_sparse(1)
    optimizer = case.ours([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.step()
    optimizer.step()
    state = [*map(weakref.ref, optimizer.state.get(params[2], {}).values())]
    return optimizer, state, [weakref.ref(params[2])]


def _step(optimizer: Any, case: Case) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
            if case.name == "sparse":
                param.grad = param.grad.to_sparse(1)
    optimizer.step()


@every_kind
@pytest.mark.parametrize("change", [_clear, _new_dict, _pop, _empty])
def test_state(case: Case, change: Change) -> None:
    optimizer, state, _ = _optimizer(case)
    change(optimizer)
    assert [ref() for ref in state] == [None] * len(state)
    _step(optimizer, case)


@every_kind
@pytest.mark.parametrize("change", [_delete_group, _replace])
def test_parameters(case: Case, change: Change) -> None:
    optimizer, state, param = _optimizer(case)
    change(optimizer)
    assert param[0]() is None
    gone = [ref for ref in state if (value := ref()) is None or value.dim()]
    assert [ref() for ref in gone] == [None] * len(gone)
    _step(optimizer, case)


@every_state
def test_parameters_that_step_in_backward(case: Case) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(DEVICE)
    groups = [{"params": [*layer.parameters()]} for layer in model]
    optimizer = case.ours(groups)
    handle = step_in_backward(model, optimizer)
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    refs: list[weakref.ref[Tensor]] = [
        weakref.ref(value) for param in groups[1]["params"] for value in _held(optimizer, param)
    ]
    refs += [weakref.ref(param) for param in groups[1]["params"]]
    for param in optimizer.param_groups[1]["params"]:
        optimizer.state.pop(param, None)
    del optimizer.param_groups[1], groups, model[1], param
    assert [ref() for ref in refs] == [None] * len(refs)
    with pytest.raises(RuntimeError, match="the optimizer's parameters are not those"):
        model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    handle.remove()


def _held(optimizer: Any, param: Tensor) -> list[Tensor]:
    return [*optimizer.state.get(param, {}).values()]


@every_kind
def test_parameters_can_be_swapped(case: Case) -> None:
    """As `model.to()` does it for DTensors: torch refuses where there is a weak reference."""
    optimizer = _optimizer(case)[0]
    other = new_param(4, 3)
    torch.utils.swap_tensors(optimizer.param_groups[1]["params"][0], other)
    _step(optimizer, case)
