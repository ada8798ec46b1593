"""Which parameters the kernels take, and which go torch's own way."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_not, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import runtime
from .layout import same_order
from .table import Entry, Table
from .ways import Group, State, check_gradient, check_state, check_step, group_refusal, refusal

if TYPE_CHECKING:
    from .fused import FusedStep


class Gradients(NamedTuple):
    """What a table's launches read anew at each step."""

    grads: list[Tensor]
    addresses: list[int]


class Stray(NamedTuple):
    """State that must move to its parameter's device and memory order."""

    param: Tensor
    state: State
    name: str


class Plan:
    """How an optimizer steps, for as long as its tensors stay where they are.

    Making one checks everything and writes nothing. `move_strays` and `prepare` follow, in this
    order; after them `gradients` and `run` make a step.

    Args:
        optimizer: its parameters have their gradients.

    Raises:
        RuntimeError: a gradient or a state tensor does not fit its parameter, or `fused=True` asks
            for kernels where there are none.
    """

    def __init__(self, optimizer: FusedStep) -> None:
        self.rest: list[Tensor] = []
        self._key = optimizer._groups_key()
        self._params = list(_all_params(optimizer))
        self._state_values: list[object] | None = None
        self._idle: list[Tensor] = []
        self._reconsidered: list[Tensor] = []
        self._entries: dict[torch.device, list[Entry]] = defaultdict(list)
        self._strays: list[Stray] = []
        self._tables: list[Table] = []
        listed = Counter(map(id, self._params))
        for index, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                where = _where(group, index, position)
                if param.grad is None:
                    self._idle.append(param)
                elif reason := group_refusal(group):
                    self._leave(optimizer, param, group, where, reason)
                elif listed[id(param)] > 1:
                    self._leave(optimizer, param, group, where, "it is listed twice")
                elif reason := refusal(param, param.grad):
                    self._leave(optimizer, param, group, where, reason)
                    self._reconsidered.append(param)
                else:
                    self._take(optimizer, param, param.grad, index, where)

    def _take(
        self, optimizer: FusedStep, param: Tensor, grad: Tensor, index: int, where: str
    ) -> None:
        group = optimizer.param_groups[index]
        names = optimizer._state_names(group)
        check_gradient(param, grad, where)
        state = optimizer.state.get(param, {})
        if optimizer._has_state(state):
            check_state(param, state, names, where, follows=optimizer._state_follows_parameter)
            if optimizer._counts_steps:
                check_step(state, where)
            for name in names:
                if state[name].device != param.device or not same_order(state[name], param):
                    self._strays.append(Stray(param, state, name))
        reordered = not same_order(param, grad) or grad.is_conj() or grad.is_neg()
        entry = Entry(param, grad, index, optimizer._flags(group), names, reordered)
        self._entries[param.device].append(entry)

    def _leave(
        self, optimizer: FusedStep, param: Tensor, group: Group, where: str, reason: str
    ) -> None:
        if group.get("fused"):
            message = f"`fused=True` cannot be kept for {where}: {reason}"
            if not param.is_cpu or runtime.DEVICE_TYPE == "cpu":
                raise RuntimeError(f"{message}; leave `fused` out and torch's own way takes it")
            warnings.warn(f"{message}; torch's for-loop steps it", stacklevel=2)
        self.rest.append(param)
        if optimizer._state_follows_parameter:
            state = optimizer.state.get(param, {})
            for name in optimizer._state_names(group):
                if name in state and state[name].device != param.device:
                    self._strays.append(Stray(param, state, name))

    def gradients(self, optimizer: FusedStep) -> list[Gradients] | None:
        """What to step with, table by table; None if the plan no longer describes the optimizer."""
        if (
            self._state_values is None
            or self._key != optimizer._groups_key()
            or _differ(_all_params(optimizer), self._params)
            or _differ(_state_values(optimizer), self._state_values)
            or any(param.grad is not None for param in self._idle)
            or any(refusal(p, p.grad) is None for p in self._reconsidered if p.grad is not None)
        ):
            return None
        found = []
        for table in self._tables:
            grads = [param.grad for param in table.params]
            addresses = table.addresses(grads)
            if addresses is None:
                return None
            found.append(Gradients(grads, addresses))  # type: ignore[arg-type]
        return found

    def move_strays(self) -> None:
        """Bring state to its parameter's device and memory order."""
        for param, state, name in self._strays:
            state[name] = torch.empty_like(param, dtype=state[name].dtype).copy_(state[name])

    def prepare(self, optimizer: FusedStep) -> list[Gradients]:
        """Make missing state and the tables. Returns what `gradients` would."""
        found = []
        for device, entries in self._entries.items():
            self._tables.append(Table(optimizer, device, entries))
            grads = [entry.grad for entry in entries]
            found.append(Gradients(grads, [grad.data_ptr() for grad in grads]))
        self._entries.clear()
        self._state_values = _state_values(optimizer)
        return found

    def run(self, optimizer: FusedStep, gradients: list[Gradients]) -> None:
        """Launch the updates, one a bucket, and count the steps."""
        hypers = list(chain.from_iterable(map(optimizer._hyperparameters, optimizer.param_groups)))
        for table, (grads, addresses) in zip(self._tables, gradients, strict=True):
            table.run(grads, addresses, hypers)


def _all_params(optimizer: FusedStep) -> Iterable[Tensor]:
    return chain.from_iterable(map(itemgetter("params"), optimizer.param_groups))


def _state_values(optimizer: FusedStep) -> list[object]:
    """Everything that `optimizer.state` holds about parameters."""
    try:
        return list(chain.from_iterable(map(dict.values, optimizer.state.values())))
    except TypeError:  # an entry that is no dict, which a checkpoint may bring for no parameter
        return list(optimizer.state.values())


def _differ(objects: Iterable[object], others: Sequence[object]) -> bool:
    """Whether these are not the very same objects. A tensor's == would compare its elements."""
    objects = list(objects)
    return len(objects) != len(others) or any(map(is_not, objects, others))


def _where(group: Group, index: int, position: int) -> str:
    names = group.get("param_names")
    name = f" ({names[position]!r})" if names else ""
    return f"parameter {position}{name} of group {index}"
