"""The state of the parameters of one table: what is there, and what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..launch.chunking import PlannedParam
from ..options import Group
from ..rule import RowWise, Rule, State
from ..storage import REMAINDER
from ..tensors.layout import picker
from ..tensors.sharding import local
from .float8 import made
from .state_validation import (
    check_counter,
    check_exponents,
    check_row_state,
    check_shapes,
    check_state,
)
from .view import OptimizerView

get_step = itemgetter("step")


def states_of(
    view: OptimizerView, params: Sequence[PlannedParam]
) -> tuple[list[State], list[State]]:
    """Every parameter's entry of `optimizer.state`, and what it lacks before a first update."""
    rule, states, new = view.rule, [], []
    for item in params:
        param, keeps_any = item.param, bool(item.names) or rule.counts_step
        state = view.state.get(param, {}) if keeps_any else {}
        complete = not keeps_any or rule.has_state(state)
        states.append(state)
        new.append({} if complete else new_state(view, param, view.groups[item.group]))
        if item.row_state is not None and item.row_state not in {**state, **new[-1]}:
            group = view.groups[item.group]
            new[-1][item.row_state] = _new_row_state(rule, param, state, group)
        if REMAINDER in item.beside and REMAINDER not in state:
            new[-1][REMAINDER] = torch.zeros_like(param, dtype=torch.int16)
    return states, new


def new_state(view: OptimizerView, param: Tensor, group: Group) -> State:
    """The state of a parameter before its first update."""
    rule, rows = view.rule, view.rule.row_wise
    state: State = {"step": new_counter(view, param, group)} if rule.counts_step else {}
    if rows is not None and rows.always and rows.state is not None:
        state[rows.state] = _new_row_state(rule, param, state, group)
    source = {**group, **view.defaults} if rule.eager_state else group
    if rule.scalars is not None:
        for name, initial in rule.scalars.initial.items():
            state[name] = new_counter(view, param, group).fill_(float(initial(source)))
    for item in rule.states:
        if item.when is None or item.when(group):
            state |= made(view, item, param, source)
    return state


def _new_row_state(rule: Rule, param: Tensor, state: State, group: Group) -> Tensor:
    """One number a row. Of lazy rows the step up to which they are: all of those that were."""
    rows = rule.row_wise or RowWise()
    made = torch.full(
        param.shape[:1], rows.initial(group), dtype=rows.dtype(param), device=param.device
    )
    return made + state["step"].to(made.dtype) if rows.lazy and "step" in state else made


def new_counter(
    view: OptimizerView, param: Tensor, group: Group, dtype: torch.dtype | None = None
) -> Tensor:
    """A step counter at 0, or another scalar, where torch keeps it.

    Args:
        dtype: another than torch's. With lazy rows always float64: float32 stops counting at 2^24,
            where rows would lose steps.
    """
    options, rows, device = view.options, view.rule.row_wise, torch.device("cpu")
    if rows is not None and rows.lazy is not None:
        dtype = torch.float64
    if options.is_fused(group) or options.is_capturable(group) or options.skip_nonfinite:
        device, dtype = param.device, dtype or torch.float32
    dtype = dtype or step_dtype()
    if device.type != "cpu":
        return torch.zeros((), dtype=dtype, device=device)
    return view.counters.take(dtype, lambda: len(view.rule.counters) * sum(view.lengths))


def step_dtype() -> torch.dtype:
    """That in which torch counts steps on the CPU."""
    double = torch.get_default_dtype() == torch.float64
    return torch.float64 if double else torch.float32


def counters_of(rule: Rule, states: Sequence[State]) -> list[Tensor]:
    """The step of every state, then each other scalar of all."""
    counters = [*map(get_step, states)] if rule.counts_step else []
    if rule.scalars is not None:
        for name in rule.scalars.names:
            counters += map(itemgetter(name), states)
    return counters


def check_state_of(
    view: OptimizerView, param: Tensor, group: Group, where: str, *, kernels: bool
) -> list[tuple[Tensor, str]]:
    """Refuse bad state. Returns the tensors that the kernels will write, with their names."""
    rule, state = view.rule, view.state[param]
    if REMAINDER in state and not view.options.keeps_remainder(param):
        raise RuntimeError(
            f"{where} is {param.dtype} now, and its state has what it lacked as bfloat16; take "
            "fp32_state_dict() before a model is converted, and make another optimizer"
        )
    is_new = state.keys() <= {REMAINDER}
    names = () if is_new else rule.state_names(group)
    if view.options.keeps_remainder(param) and REMAINDER in state:
        names = (*names, REMAINDER)
    check_shapes(param, state, names, where)
    held: Sequence[str] = names
    beside = [name for name in view.options.names_beside(param, names) if name != REMAINDER]
    if rule.row_wise is not None and rule.row_wise.state is not None and rule.has_row_state(state):
        name = rule.row_wise.state
        check_row_state(param, state, name, rule.row_wise.dtype(param), where)
        held = (*names, name)
    if not kernels:
        return []
    dtypes = {name: view.options.dtype_of(name, param) for name in names}
    check_state(param, state, dtypes, where, follows=rule.eager_state)
    for counter in rule.counters if rule.counts_step and not is_new else ():
        check_counter(state, counter, where)
    for name in beside:
        check_exponents(param, state, name, where)
    return [(local(state[name]), f"state {name!r} of {where}") for name in (*held, *beside)]


class Holders:
    """Which parameters have which state: reads it from entries of `optimizer.state`.

    Attributes:
        stateful: indices of the parameters that have an entry.
        rows: of each parameter, the indices of its gradient, itself and its state among all
            gradients, all parameters and what `values` returns, one after another.
        remainders: of each parameter that has one, its index, and where the remainder stands among
            all parameters and what `values` returns.
    """

    def __init__(self, planned: Sequence[PlannedParam], *, counts_steps: bool) -> None:
        self.stateful = [i for i, item in enumerate(planned) if item.names or counts_steps]
        places = {i: place for place, i in enumerate(self.stateful)}
        self.rows = [[i, len(planned) + i] for i in range(len(planned))]
        self.remainders: list[tuple[int, int]] = []
        self._pick_holders: list[Callable[[Sequence[int]], Sequence[int]]] = []
        self._names: list[tuple[Callable[[State], Any], Callable[[Sequence[State]], Any]]] = []
        n = 2 * len(planned)
        for name in dict.fromkeys(chain.from_iterable(item.names for item in planned)):
            holders = [i for i, item in enumerate(planned) if name in item.names]
            if name == REMAINDER:
                self.remainders = [(i, n - len(planned) + k) for k, i in enumerate(holders)]
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
