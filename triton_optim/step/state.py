"""The state of the parameters of one table: what is there, and what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..launch.chunking import Entry
from ..tensors.layout import picker
from .routing import State

if TYPE_CHECKING:
    from ..optimizer import FusedStep

get_step = itemgetter("step")


def states_of(optimizer: FusedStep, entries: Sequence[Entry]) -> tuple[list[State], list[State]]:
    """Every parameter's entry of optimizer.state, and what it lacks before a first update."""
    states, new = [], []
    for entry in entries:
        state = optimizer.state.get(entry.param, {}) if entry.names else {}
        complete = not entry.names or optimizer._has_state(state)
        group = optimizer.param_groups[entry.group]
        states.append(state)
        new.append({} if complete else optimizer._new_state(entry.param, group))
        if entry.row_state is not None and entry.row_state not in {**state, **new[-1]}:
            new[-1][entry.row_state] = optimizer._new_row_state(entry.param, state)
    return states, new


class Holders:
    """Which parameters have which state: reads it from entries of `optimizer.state`.

    Args:
        entries: the parameters.
        counts_steps: whether the state of each has a step count too.

    Attributes:
        stateful: indices of the parameters that have an entry.
        rows: of each parameter, the indices of its gradient, itself and its state among all
            gradients, all parameters and what `values` returns, one after another.
    """

    def __init__(self, entries: Sequence[Entry], *, counts_steps: bool) -> None:
        self.stateful = [i for i, entry in enumerate(entries) if entry.names or counts_steps]
        places = {i: place for place, i in enumerate(self.stateful)}
        self.rows = [[i, len(entries) + i] for i in range(len(entries))]
        self._pick_holders: list[Callable[[Sequence[int]], Sequence[int]]] = []
        self._names: list[tuple[Callable[[State], Any], Callable[[Sequence[State]], Any]]] = []
        n = 2 * len(entries)
        for name in dict.fromkeys(chain.from_iterable(entry.names for entry in entries)):
            holders = [i for i, entry in enumerate(entries) if name in entry.names]
            for place, i in enumerate(holders, start=n):
                self.rows[i].append(place)
            n += len(holders)
            self._names.append((itemgetter(name), picker([places[i] for i in holders])))
            self._pick_holders.append(picker(holders))

    def written(self, present: bytes) -> bytes:
        """1 of each parameter that is present, and of what `values` returns for it."""
        return b"".join([present, *(bytes(pick(present)) for pick in self._pick_holders)])

    def values(self, states: Sequence[State]) -> list[Tensor]:
        """All state tensors that rules update, by name, from the entries of `stateful`."""
        return [*chain.from_iterable(map(get, pick(states)) for get, pick in self._names)]


def bring_together(steps: Iterable[Tensor], device: torch.device) -> None:
    """Move counters to one device and dtype; each stays the tensor object that it is."""
    steps = [*steps]
    double = any(step.dtype == torch.float64 for step in steps)
    dtype = torch.float64 if double else torch.float32
    for step in steps:
        if step.device != device or step.dtype != dtype:
            step.data = step.to(device, dtype, non_blocking=True)
