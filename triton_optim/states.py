"""The state of the parameters of one table: what is there, what is new, and the step counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .columns import on_device
from .cuts import Entry
from .ways import State

if TYPE_CHECKING:
    from .fused import FusedStep

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


def holders_of(entries: Sequence[Entry], states: Sequence[State]) -> dict[str, list[State]]:
    """By name of the tensors that the rule updates, those of `states` that hold one."""
    holders = defaultdict(list)
    for entry, state in zip(entries, states, strict=True):
        for name in entry.names:
            holders[name].append(state)
    return holders


def values_of(holders: Mapping[str, Sequence[State]]) -> list[Tensor]:
    return [*chain.from_iterable(map(itemgetter(n), states) for n, states in holders.items())]


def pack_steps(steps: Sequence[Tensor], device: torch.device, *, on_device: bool) -> Tensor:
    """One tensor of all step counts: one operation counts them all.

    On the CPU, unless they are to be on `device`, or one of them lies there already: reading that
    one here would wait for the GPU.
    """
    home = device if on_device or not all(step.is_cpu for step in steps) else torch.device("cpu")
    double = any(step.dtype == torch.float64 for step in steps)
    dtype = torch.float64 if double else torch.float32
    return torch.stack([step.to(home, dtype, non_blocking=True).view(()) for step in steps])


def count_updates(new: Sequence[State], device: torch.device) -> Tensor:
    """How often each tensor was updated, for a rule that must know but keeps no `step`: 0 or 1."""
    seen = torch.tensor([0.0 if state else 1.0 for state in new], device="cpu")
    return on_device(seen, device)
