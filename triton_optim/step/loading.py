"""State that was loaded, or that torch's class made: brought to where and what it is kept in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..options import Group
from ..rule import State
from ..storage import EIGHT_BITS, REMAINDER
from ..tensors.sharding import PLAIN_TYPES
from .float8 import encoded, made
from .routing import is_traced, unsupported
from .state import check_state_of, new_counter, step_dtype
from .validation import check_no_overlap
from .view import OptimizerView

_COUNTER_DTYPES = (torch.float32, torch.float64)


def adopt_steps(view: OptimizerView, *, replaces: bool) -> None:
    """Put the step counts of new state, and other scalars, where one operation counts them all.

    Not those in shared memory, in which other processes count too.

    Args:
        replaces: whether the state gets other tensors, and a checkpoint keeps its own.
    """
    if not view.rule.counts_step or is_traced():
        return
    for group in view.groups:
        for param in group["params"]:
            for name in view.rule.counters:
                _adopt(view, param, group, name, replaces=replaces)


def _adopt(view: OptimizerView, param: Tensor, group: Group, name: str, *, replaces: bool) -> None:
    state = view.state.get(param, {})
    counter = state.get(name)
    if _is_private(counter):
        new = new_counter(view, param, group, counter.dtype).copy_(counter.view(()))
        if replaces:
            state[name] = new
        else:
            counter.data = new.view(counter.shape)


def widen_steps(view: OptimizerView) -> None:
    """Let counters of lazy rows be float64, whatever was loaded."""
    if view.rule.row_wise is None or view.rule.row_wise.lazy is None:
        return
    for values in view.state.values():
        step = values.get("step")
        if isinstance(step, Tensor) and step.dtype != torch.float64:
            step.data = step.double()


def _is_private(step: object) -> TypeGuard[Tensor]:
    """Whether it is a counter on the CPU that is in no other process."""
    return (
        type(step) is Tensor
        and step.dtype in _COUNTER_DTYPES
        and step.numel() == 1
        and step.is_cpu
        and not step.is_shared()
    )


def check_loaded(view: OptimizerView) -> None:
    """Refuse loaded state with which a step would fail."""
    written: list[tuple[Tensor, str]] = []
    for _, param, _, group, where, _ in view.named():
        state = view.state.get(param, {})
        foreign = any(isinstance(value, Tensor) for value in state.values())
        if type(param) in PLAIN_TYPES and (view.rule.has_state(state) or foreign):
            kernels = unsupported(view, param, param, group) is None
            written += check_state_of(view, param, group, where, kernels=kernels)
    check_no_overlap(written)


def restore_uncast(view: OptimizerView, loaded: Mapping[str, Any]) -> None:
    """Load once more what torch cast to its parameter's dtype and is kept in another."""
    ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    for key, param in zip(ids, view.params, strict=True):
        entry, state = loaded["state"].get(key, {}), view.state.get(param, {})
        for name in entry.keys() & state.keys():
            if isinstance(entry[name], Tensor):
                _restore(view, param, state, name, entry[name])
        if not view.options.keeps_remainder(param):
            state.pop(REMAINDER, None)


def _restore(view: OptimizerView, param: Tensor, state: State, name: str, value: Tensor) -> None:
    rule, rows = view.rule, view.rule.row_wise
    if rows is not None and name == rows.state:
        state[name] = value.to(param.device, rows.dtype(param))
    elif name in rule.counters[1:]:
        device = getattr(state.get("step"), "device", "cpu")
        kept = value.dtype in _COUNTER_DTYPES or value.is_complex()  # which is refused
        state[name] = value.to(device, value.dtype if kept else step_dtype())
    elif name == REMAINDER and value.is_floating_point():  # torch's own optimizer has cast it
        del state[name]
    elif name == REMAINDER or value.dtype == EIGHT_BITS:
        state[name] = value.to(param.device)
    else:
        for item in rule.states:
            dtype = view.options.dtype_of(name, param) if item.name == name else None
            if dtype == EIGHT_BITS:
                state.update(encoded(item, param, value.to(param.device)))
            elif dtype is not None:
                state[name] = value.to(param.device, dtype)


def count_from_here(view: OptimizerView) -> None:
    """Let loaded state of a rule that counts for its random numbers alone have a step."""
    for state in view.state.values():
        is_new = not isinstance(state, dict) or state.keys() <= {REMAINDER}
        if not is_new and "step" not in state:
            state["step"] = torch.ones((), dtype=step_dtype())


def remake_state(view: OptimizerView, groups: Iterable[Group]) -> None:
    """Make what torch's class made in its constructor in the dtypes in which it is kept."""
    for group in groups:
        for param in group["params"]:
            state = view.state.get(param, {})
            for item in view.rule.states:
                if item.name in state and view.options.dtype_of(item.name, param) is not None:
                    state.update(made(view, item, param, {**group, **view.defaults}))
