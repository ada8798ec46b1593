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
from torch.optim import Optimizer

from . import norm, runtime
from .checks import check_apart, check_ids, check_meshes, check_tensors, check_writable, describe
from .cuts import Entry
from .dense import DenseTable
from .gate import Gate
from .layout import LayoutGuard, same_order
from .rows import RowTable
from .shards import bring_grad, is_dtensor, local, spread
from .table import Copies, Found, Table
from .ways import PLAIN_TYPES, State, moved, strays

if TYPE_CHECKING:
    from .fused import FusedStep

_PARAMS = itemgetter("params")


class Stray(NamedTuple):
    """State that must move to its parameter's device and memory order."""

    param: Tensor
    state: State
    name: str


class Plan:
    """How an optimizer steps, for as long as its tensors stay where they are.

    Making one checks everything and writes nothing. Its first step is `move_strays`, `make_tables`,
    `prepare`, `run`, `keep`; every later one `find`, `prepare` and `run`.

    Args:
        optimizer: its parameters have their gradients.

    Raises:
        RuntimeError: a gradient or a state tensor does not fit its parameter, tensors share memory,
            or `fused=True` asks for kernels where there are none.
    """

    def __init__(self, optimizer: FusedStep) -> None:
        self.rest: list[Tensor] = []
        self.uses_kernels = self.on_gpu = False
        self._was_gated = optimizer._was_gated
        self._key = optimizer._groups_key()
        self.params = list(all_params(optimizer))
        self._lengths = _lengths(optimizer)
        self._states: list[State] = []
        self._idle: list[Tensor] = []
        self._steady: list[Tensor] = []  # of rest, those that a LayoutGuard can watch
        # and the others, whose gradient may become dense, with their group and name
        self._reconsidered: list[tuple[Tensor, int, str]] = []
        # by device, DTensors and those by rows apart
        self._entries: dict[tuple[torch.device, bool, bool], list[Entry]] = defaultdict(list)
        self._strays: list[Stray] = []
        self._tables: list[Table] = []
        written: list[tuple[Tensor, str]] = []
        listed = Counter(map(id, self.params))
        for index, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                where = describe(group, index, position)
                bring_grad(param)
                if param.grad is None:
                    self._idle.append(param)
                    continue
                check_tensors(param, param.grad, where)
                if param.grad.layout == torch.sparse_coo:
                    check_ids(param.grad._indices(), param.shape, where)
                optimizer._check_capturable(param, group, where)
                if listed[id(param)] > 1:
                    self._leave(optimizer, param, param.grad, index, where, "it is listed twice")
                elif reason := optimizer._refusal(param, param.grad, group):
                    self._leave(optimizer, param, param.grad, index, where, reason)
                else:
                    written += self._take(optimizer, param, param.grad, index, where)
        check_apart(written)
        if optimizer.max_grad_norm is not None:
            check_meshes(param for param in self.params if param.grad is not None)
        grads = [grad for grad in _grads(self._steady) if grad is not None]
        self._guard = LayoutGuard([*self._steady, *grads])
        groups = optimizer.param_groups
        self._get_values = itemgetter(
            *(name for name in optimizer.defaults if all(name in group for group in groups))
        )
        self._values: list[object] = []
        self._values_mutate = False
        self._keep_values(optimizer, self.group_values(optimizer))

    def _take(
        self, optimizer: FusedStep, param: Tensor, grad: Tensor, index: int, where: str
    ) -> list[tuple[Tensor, str]]:
        """Returns what is there of the tensors that the update will write, with their names."""
        group = optimizer.param_groups[index]
        names = optimizer._state_names(group)
        state = optimizer.state.get(param, {})
        shard, part = local(param), local(grad)
        written = [(shard, where)]
        if optimizer._has_state(state):
            written += optimizer._check_state(param, group, where, kernels=True)
            self._strays += (Stray(param, state, name) for name in strays(param, state, names))
        by_rows = optimizer._by_rows(part, state)
        row_state = None
        reordered = False
        if by_rows:
            optimizer._check_rows(grad, group, where)
            row_state = optimizer._row_state
        else:
            reordered = not same_order(shard, part) or part.is_conj() or part.is_neg()
        flags = optimizer._flags(group)
        entry = Entry(
            param, shard, part, spread(param), index, flags, names, reordered, row_state, where
        )
        self._entries[shard.device, is_dtensor(param), by_rows].append(entry)
        self.uses_kernels = True
        self.on_gpu |= shard.device.type in runtime.CAPTURABLE_DEVICE_TYPES
        return written

    def _leave(
        self, optimizer: FusedStep, param: Tensor, grad: Tensor, index: int, where: str, reason: str
    ) -> None:
        group = optimizer.param_groups[index]
        optimizer._check_leaving(param, grad, group, where, reason)
        if optimizer._fused(group):
            message = f"`fused=True` cannot be kept for {where}: {reason}"
            if not param.is_cpu or runtime.DEVICE_TYPE == "cpu":
                raise RuntimeError(f"{message}; leave `fused` out and torch's own way takes it")
            warnings.warn(f"{message}; torch's for-loop steps it", stacklevel=2)
        state = optimizer.state.get(param, {})
        if type(param) in PLAIN_TYPES and optimizer._has_state(state):
            optimizer._check_state(param, group, where, kernels=False)
        plain = all(type(t) in PLAIN_TYPES and t.layout == torch.strided for t in (param, grad))
        if plain:
            self._steady.append(param)
        else:
            self._reconsidered.append((param, index, where))
        self.rest.append(param)
        if optimizer._state_follows_parameter:
            for name in optimizer._state_names(group):
                if name in state and state[name].device != param.device:
                    self._strays.append(Stray(param, state, name))

    def find(self, optimizer: FusedStep) -> list[Found] | None:
        """What to step with, table by table; None if the plan no longer describes the optimizer."""
        if (
            not self._same_groups(optimizer)
            or differ(all_params(optimizer), self.params)
            or _lengths(optimizer) != self._lengths
            or differ(optimizer.state.values(), self._states)
            or self._was_gated != optimizer._was_gated
            or ((self._idle or self.rest) and self._others_changed(optimizer))
        ):
            return None
        found = []
        for table in self._tables:
            tensors = table.find()
            if tensors is None:
                return None
            found.append(tensors)
        return found

    def _same_groups(self, optimizer: FusedStep) -> bool:
        """Whether parameters go the same ways; brings the hyperparameters up to date."""
        values = self.group_values(optimizer)
        if self._values_mutate or differ(values, self._values):
            if optimizer._groups_key() != self._key:
                return False
            self._keep_values(optimizer, values)
        return True

    def group_values(self, optimizer: FusedStep) -> list[object]:
        return [*chain.from_iterable(map(self._get_values, optimizer.param_groups))]

    def _keep_values(self, optimizer: FusedStep, values: list[object]) -> None:
        self._values = []  # until all is done: an interrupt may come between
        self._hypers = optimizer._scalars() if self.uses_kernels else []
        self._values_mutate = not all(v is None or isinstance(v, (float, int)) for v in values)
        self._values = values

    def _others_changed(self, optimizer: FusedStep) -> bool:
        """Whether a parameter that the kernels do not take must be looked at again."""
        groups = optimizer.param_groups
        for param, _, where in self._reconsidered:
            if param.grad is not None and param.grad.layout == torch.sparse_coo:
                check_ids(param.grad._indices(), param.shape, where)
        return (
            any(param.grad is not None for param in self._idle)
            or any(
                optimizer._refusal(param, param.grad, groups[index]) is None
                for param, index, _ in self._reconsidered
                if param.grad is not None
            )
            or not self._guard.check([*self._steady, *_grads(self._steady)])
        )

    def move_strays(self) -> None:
        """Bring state to its parameter's device and memory order."""
        for param, state, name in self._strays:
            state[name] = moved(param, state[name])
        self._strays.clear()

    def make_tables(self, optimizer: FusedStep) -> list[Found]:
        """Make the tables, and state where it is missing. Returns what `find` would."""
        on_device = optimizer._counts_on_device
        self._tables = [
            (RowTable if by_rows else DenseTable)(
                optimizer, device, entries, self._hypers, counts_on_device=on_device
            )
            for (device, _, by_rows), entries in self._entries.items()
        ]
        self._entries.clear()
        return [table.first for table in self._tables if table.first is not None]

    def prepare(self, found: list[Found], gate: Gate) -> list[Copies]:
        """Compile, and bring the tables up to date: nothing of the optimizer is written."""
        for table, tensors in zip(self._tables, found, strict=True):
            if gate.kinds:
                gate.check_device(table.device)
            if gate.grad_scale is not None:
                check_writable(table.reordered(tensors))
                table.check_apart(tensors)
            table.prepare(gate.kinds)
        return [
            table.send(tensors, self._hypers, gate.max_norm)
            for table, tensors in zip(self._tables, found, strict=True)
        ]

    def norm(self, gate: Gate) -> Tensor:
        """The norm of all gradients, over all ranks: float64 [], valid until the next step."""
        dense = (table for table in self._tables if isinstance(table, DenseTable))
        norms = [table.sum_squares(gate) for table in dense]
        grads = (param.grad for param in self.rest if param.grad is not None)
        rest = norm.square_sums(grads, gate.grad_scale)
        return norm.total(norms, rest)

    def run(self, found: list[Found], copies: list[Copies], gate: Gate) -> None:
        """Launch the updates and count the steps."""
        for table, tensors, replaced in zip(self._tables, found, copies, strict=True):
            table.update(tensors, replaced, gate)

    def skipped(self) -> Tensor | None:
        """Float32 []: 1 where the last step was skipped, or 0. None without tables."""
        happened = self._tables[0].happened if self._tables else None
        return None if happened is None else happened[1]

    def forget_skipped(self, optimizer: Optimizer) -> None:
        """Take back state that skipped steps made; see `Table.forget_skipped`."""
        for table in self._tables:
            table.forget_skipped(optimizer)

    def keep(self, optimizer: FusedStep) -> None:
        """After the first step: its new state is the optimizer's now."""
        for table in self._tables:
            table.hand_over_state(optimizer)
        self._states = list(optimizer.state.values())


def all_params(optimizer: Optimizer) -> Iterable[Tensor]:
    return chain.from_iterable(map(_PARAMS, optimizer.param_groups))


def _lengths(optimizer: FusedStep) -> list[int]:
    return [*map(len, map(_PARAMS, optimizer.param_groups))]


def _grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    return [param.grad for param in params]


def differ(objects: Iterable[object], others: Sequence[object]) -> bool:
    """Whether these are not the very same objects. A tensor's == would compare its elements."""
    objects = [*objects]
    return len(objects) != len(others) or any(map(is_not, objects, others))
