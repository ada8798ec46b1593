"""The class around the step, under torch's own database: messages and hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import as_saved, new_param
from paired_optimizers import Pair
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook as global_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook as global_pre_hook
from torch_optim_db import Config, common_optimizers, errors, every_config, every_optimizer

import triton_optim

FLAGS = [("fused", True), ("fused", False), ("foreach", True), ("differentiable", True)]


@pytest.mark.parametrize(("name", "error"), list(errors()))
def test_constructor_errors(name: str, error: common_optimizers.ErrorOptimizerInput) -> None:
    wrong = error.optimizer_error_input
    # torch's RMSprop has no `fused`; SGD speaks of it as the others do.
    reference = getattr(torch.optim, "SGD" if "fused" in wrong.kwargs else name)
    messages = []
    for optimizer_class in (getattr(triton_optim, name), reference):
        params, kwargs = copy.deepcopy((wrong.params, wrong.kwargs))
        with pytest.raises(error.error_type, match=error.error_regex) as caught:
            optimizer_class(params, **kwargs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@every_optimizer
def test_load_state_dict_errors(case: Config) -> None:
    messages = []
    for make in (case.ours, case.theirs):
        one, two = (make([new_param(2) for _ in range(n)]) for n in (1, 2))
        groups = make([{"params": [new_param(2)]} for _ in range(2)])
        for other in (two, groups):
            with pytest.raises(ValueError) as caught:
                one.load_state_dict(other.state_dict())
            messages.append(str(caught.value))
    assert messages[:2] == messages[2:]


@every_optimizer
def test_fused_refuses_parameters_on_meta(case: Config) -> None:
    param = Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        case.ours([param], fused=True).step()


def _note(calls: list[Any], name: str, answer: object = None) -> Callable[..., Any]:
    def hook(*args: Any) -> object:
        calls.append((name, *args))
        return answer

    return hook


@pytest.mark.parametrize("way", [{}, *({flag: on} for flag, on in FLAGS)], ids=str)
@every_optimizer
def test_step_hooks(case: Config, way: dict[str, bool]) -> None:
    """Once a step on every route, and no more once they are removed."""
    case.theirs([new_param(1)])  # whose class calls hooks around its own step from here on
    calls: list[Any] = []
    optimizer = case.ours([new_param(5).requires_grad_(False)], **way)
    handles = [
        optimizer.register_step_post_hook(_note(calls, "post")),
        optimizer.register_step_pre_hook(_note(calls, "pre")),
        global_post_hook(_note(calls, "global post")),
        global_pre_hook(_note(calls, "global pre")),
    ]
    try:
        assert optimizer.step(closure := lambda: 3.0) == 3.0
    finally:
        for handle in handles:
            handle.remove()
    names = ("global pre", "pre", "post", "global post")
    assert calls == [(name, optimizer, (optimizer, closure), {}) for name in names]
    optimizer.step()
    assert len(calls) == 4


@every_optimizer
def test_a_hook_replaces_the_arguments(case: Config) -> None:
    optimizer = case.ours([new_param(5)])
    replaced = (optimizer,), {"closure": lambda: 2.0}
    handle = optimizer.register_step_pre_hook(_note([], "pre", replaced))
    calls: list[Any] = []
    optimizer.register_step_post_hook(_note(calls, "post"))
    assert optimizer.step(lambda: 3.0) == 2.0
    assert calls == [("post", optimizer, *replaced)]
    handle.remove()
    optimizer.register_step_pre_hook(_note([], "pre", "neither"))
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@every_optimizer
def test_state_dict_hooks(case: Config) -> None:
    calls: list[Any] = []
    optimizer = case.ours([new_param(5)])
    optimizer.step()
    plain, replaced = optimizer.state_dict(), {"replaced": True}
    optimizer.register_state_dict_pre_hook(_note(calls, "second"))
    optimizer.register_state_dict_pre_hook(_note(calls, "first"), prepend=True)
    optimizer.register_state_dict_post_hook(_note(calls, "fourth"))
    optimizer.register_state_dict_post_hook(_note(calls, "third", replaced), prepend=True)
    assert optimizer.state_dict() is replaced
    assert calls[:2] == [("first", optimizer), ("second", optimizer)]
    assert [call[0] for call in calls[2:]] == ["third", "fourth"]
    assert_same_bits(calls[2][2], plain)
    assert calls[3][2] is replaced


@every_config
def test_load_state_dict_hooks(case: Config) -> None:
    """One that changes, before it one that replaces, and one afterwards; steps follow them."""
    both = Pair(case)
    both.step()

    def change(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] += 0.25

    def replace(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.5
        return state_dict

    def halve(optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"] /= 2

    for optimizer in both.optimizers:
        optimizer.register_load_state_dict_pre_hook(change)
        optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
        optimizer.register_load_state_dict_post_hook(halve)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.375
    as_saved(both.optimizers[1])
    both.step(2)
