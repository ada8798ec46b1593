"""Which parameters the kernels take, and which go torch's own way."""

from __future__ import annotations

import gc
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_not, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..launch import backend
from ..launch.chunking import Entry, Look
from ..launch.pointer_tables import is_aligned
from ..launch.row_launcher import address_of, kind_of
from ..tensors.layout import Layout, LayoutGuard, strides_agree
from ..tensors.sharding import PLAIN_TYPES, bring_grad, is_dtensor, local, spread
from . import grad_norm
from .conditions import Gate
from .dense import DenseTable
from .launch_group import Copies, Current, Found, Table, present_of
from .routing import Group, State, is_traced, moved, strays
from .row_wise import RowTable
from .validation import (
    check_apart,
    check_asked_for,
    check_ids,
    check_meshes,
    check_tensors,
    check_writable,
    describe,
)

if TYPE_CHECKING:
    from ..optimizer import FusedStep

_PARAMS = itemgetter("params")


class Stray(NamedTuple):
    """State that must move to its parameter's device and memory order."""

    param: Tensor
    state: State
    name: str


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Collect no garbage meanwhile: among many new objects that takes as long as making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Plan:
    """How an optimizer steps, for as long as its tensors stay where they are.

    Making one checks everything and writes nothing. Its first step is `move_strays`, `make_tables`,
    `prepare`, `run`, `keep`; every later one `find`, `prepare` and `run`. A parameter belongs to it
    from its first gradient on, also in steps in which it has none. It holds none of the optimizer's
    tensors.

    Args:
        optimizer: its parameters have their gradients.
        previous: the plan before, which knows parameters that have no gradient now.

    Raises:
        RuntimeError: a gradient or a state tensor does not fit its parameter, tensors share memory,
            or `fused=True` asks for kernels where there are none.
    """

    @_gc_paused()
    def __init__(self, optimizer: FusedStep, previous: Plan | None = None) -> None:
        self.uses_kernels = False
        self.gpus: set[torch.device] = set()
        self._may_skip = optimizer._internals.may_skip
        self._is_inference = torch.is_inference_mode_enabled()
        optimizer._check_hyperparameters()
        self._key = optimizer._groups_key()
        self._lengths = _lengths(optimizer)
        params = [*all_params(optimizer)]
        self._looks: list[Look | None] = [None] * len(params)
        if previous is not None and previous._lengths == self._lengths:
            same = previous._key == self._key  # if not, what goes torch's way may go another
            self._looks = [x if same or x is None or x.is_taken else None for x in previous._looks]
        self._idle: list[int] = []  # positions of those without a gradient until now
        self._rest: list[int] = []  # of those that go torch's own way
        self._steady: list[int] = []  # of rest, those that a LayoutGuard can watch
        # and the others, whose gradient may become dense, with their group and name
        self._reconsidered: list[tuple[int, int, str]] = []
        # by device, DTensors and those by rows apart
        self._entries: dict[tuple[torch.device, bool, bool], list[Entry]] = defaultdict(list)
        self._strays: list[Stray] = []
        self._tables: list[Table] = []
        written: list[tuple[Tensor, str]] = []
        written_later: list[tuple[Tensor, str]] = []  # once there is a gradient again
        listed = Counter(map(id, params))
        for position, (param, index, where) in enumerate(_named(optimizer)):
            bring_grad(param)
            grad, group, look = param.grad, optimizer.param_groups[index], self._looks[position]
            if grad is None and not self._goes_on(optimizer, param, group, look):
                self._idle.append(position)
                continue
            if grad is not None:
                check_tensors(param, grad, where)
                if grad.layout == torch.sparse_coo and not is_traced():
                    check_ids(grad._indices(), param.shape, where)
            optimizer._check_capturable(param, group, where)
            if grad is None:
                reason = None if look is not None and look.is_taken else "it went so before"
            elif listed[id(param)] > 1:
                reason = "it is listed twice"
            else:
                reason = optimizer._refusal(param, grad, group)
            if reason is None:
                taken = self._take(optimizer, position, param, index, where)
                (written if grad is not None else written_later).extend(taken)
            else:
                self._leave(optimizer, position, param, index, where, reason)
        check_apart(written)
        if written_later:
            self._leave_out_what_overlaps([*written, *written_later])
        self._ids = [*map(id, params)] if self._rest else []
        if optimizer.max_grad_norm is not None:
            check_meshes(param for param in params if param.grad is not None)
        looks = [look for i in self._steady if (look := self._looks[i]) is not None]
        n, layouts = len(looks), [*(look.grad for look in looks), *(look.param for look in looks)]
        pairs = [(i, n + i) for i in range(n)]
        self._guard = LayoutGuard([x for x in layouts if x is not None], pairs)
        groups = optimizer.param_groups
        # Options that a group may have for itself, and get later.
        self._optional = sorted(optimizer._internals.options & {"fused", "capturable"})
        self._get_values = itemgetter(
            *(name for name in optimizer.defaults if all(name in group for group in groups))
        )
        self._values: list[object] = []
        self._values_mutate = False
        self._keep_values(optimizer, self.group_values(optimizer))

    def _leave_out_what_overlaps(self, written: list[tuple[Tensor, str]]) -> None:
        """Where those without a gradient share memory, let them wait for one."""
        try:
            check_apart(written)
        except RuntimeError:
            for key, entries in [*self._entries.items()]:
                self._idle += [entry.position for entry in entries if entry.grad is None]
                self._entries[key] = [entry for entry in entries if entry.grad is not None]
                if not self._entries[key]:
                    del self._entries[key]

    @staticmethod
    def _goes_on(optimizer: FusedStep, param: Tensor, group: Group, look: Look | None) -> bool:
        """Whether a parameter without a gradient goes the way that it went with its latest one.

        It waits for its next one if anything would have to be refused, or moved.
        """
        if look is None:
            return False
        shard = local(param)
        if look.param is not None and (
            # it may be frozen meanwhile
            look.param._replace(requires_grad=shard.requires_grad) != Layout.of(shard)
        ):
            return False
        if not look.is_taken:
            return True
        names, state = optimizer._state_names(group), optimizer.state.get(param, {})
        if optimizer._refusal(param, param, group) is not None or (
            look.kind is not None and optimizer._row_refusal(group) is not None
        ):
            return False
        if not optimizer._has_state(state):
            return not (names or optimizer._counts_steps)
        try:
            optimizer._check_state(param, group, "", kernels=True)
        except RuntimeError:
            return False
        return not strays(param, state, names)

    def _take(
        self, optimizer: FusedStep, position: int, param: Tensor, index: int, where: str
    ) -> list[tuple[Tensor, str]]:
        """Returns what is there of the tensors that the update will write, with their names."""
        group = optimizer.param_groups[index]
        names = optimizer._state_names(group)
        state = optimizer.state.get(param, {})
        shard, grad = local(param), None if param.grad is None else local(param.grad)
        written = [(shard, where)]
        if optimizer._has_state(state):
            check_asked_for(state, names, optimizer._flags(group), where)
            written += optimizer._check_state(param, group, where, kernels=True)
            self._strays += (Stray(param, state, name) for name in strays(param, state, names))
        look = self._looks[position]
        if grad is not None:
            look = look_at(shard, grad, by_rows=optimizer._by_rows(grad, state))
            self._looks[position] = look
        assert look is not None
        by_rows, row_state, reordered = look.kind is not None, None, False
        if by_rows:
            if grad is not None:
                optimizer._check_rows(grad, group, where)
            row_state = optimizer._row_state
        elif look.grad is not None:
            order = look.grad.stride
            reordered = look.grad.is_lazy or not strides_agree(shard.shape, shard.stride(), order)
        entry = Entry(
            position,
            param,
            shard,
            grad,
            look,
            spread(param),
            index,
            optimizer._flags(group),
            names,
            reordered,
            row_state,
            where,
        )
        self._entries[shard.device, is_dtensor(param), by_rows].append(entry)
        self.uses_kernels = True
        if shard.device.type in backend.CAPTURABLE_DEVICE_TYPES:
            self.gpus.add(shard.device)
        return written

    def _leave(
        self,
        optimizer: FusedStep,
        position: int,
        param: Tensor,
        index: int,
        where: str,
        reason: str,
    ) -> None:
        group, grad = optimizer.param_groups[index], param.grad
        if grad is not None:
            optimizer._check_leaving(param, grad, group, where, reason)
            if optimizer._fused(group):
                _check_insisting(param, where, reason)
        state = optimizer.state.get(param, {})
        checked = grad is not None and type(param) in PLAIN_TYPES
        if checked and optimizer._has_state(state):
            names, flags = optimizer._state_names(group), optimizer._flags(group)
            check_asked_for(state, names, flags, where)
            optimizer._check_state(param, group, where, kernels=False)
        if grad is not None:
            plain = all(type(t) in PLAIN_TYPES and t.layout == torch.strided for t in (param, grad))
            layouts = (Layout.of(param), Layout.of(grad)) if plain else (None, None)
            self._looks[position] = Look(*layouts)
        look = self._looks[position]
        if look is not None and look.param is not None:
            self._steady.append(position)
        else:
            self._reconsidered.append((position, index, where))
        self._rest.append(position)
        if grad is not None and optimizer._state_follows_parameter:
            for name in optimizer._state_names(group):
                if name in state and state[name].device != param.device:
                    self._strays.append(Stray(param, state, name))

    @property
    def has_rest(self) -> bool:
        """Whether some parameters go torch's own way."""
        return bool(self._rest)

    def rest(self, optimizer: Optimizer) -> list[Tensor]:
        """The parameters that go torch's own way."""
        params = [*all_params(optimizer)] if self._rest else []
        return [params[i] for i in self._rest]

    def is_captured(self) -> bool:
        """Whether a step goes into a CUDA graph now.

        Raises:
            RuntimeError: not all of it would.
        """
        if not self.gpus:
            return False
        captured = any(map(backend.is_capturing, self.gpus))
        if not (captured or torch.cuda.is_current_stream_capturing()):
            return False
        places = " and ".join(sorted(map(str, self.gpus)))
        if len(self.gpus) > 1:
            raise RuntimeError(
                f"a CUDA graph is captured, but parameters are on {places}; give the parameters of "
                "each GPU an optimizer and a graph of their own"
            )
        if not captured:
            raise RuntimeError(
                f"a CUDA graph is captured on another GPU than the parameters', which are on "
                f"{places}; capture within `with torch.cuda.device(...)` of that GPU"
            )
        return True

    def is_prepared(self, gate: Gate) -> bool:
        """Whether all kernels of such a step are compiled."""
        return all(table.is_prepared(gate.kinds) for table in self._tables)

    def find(self, optimizer: FusedStep) -> list[Found] | None:
        """What to step with, table by table; None if the plan no longer describes the optimizer."""
        if (
            _lengths(optimizer) != self._lengths
            or not self._same_groups(optimizer)
            or self._may_skip != optimizer._internals.may_skip
            or self._is_inference != torch.is_inference_mode_enabled()
        ):
            return None
        params = [*all_params(optimizer)]
        if self._rest and [*map(id, params)] != self._ids:
            return None
        if (self._idle or self._rest) and self._others_changed(optimizer, params):
            return None
        found = []
        current = Current.of(optimizer, params)
        for table in self._tables:
            tensors = table.find(current)
            if tensors is None:
                return None
            found.append(tensors)
        return found

    def _same_groups(self, optimizer: FusedStep) -> bool:
        """Whether parameters go the same ways; brings the hyperparameters up to date."""
        values = self.group_values(optimizer)
        if self._values_mutate or differ(values, self._values):
            optimizer._check_hyperparameters()
            if optimizer._groups_key() != self._key:
                return False
            self._keep_values(optimizer, values)
        return True

    def group_values(self, optimizer: FusedStep) -> list[object]:
        groups = optimizer.param_groups
        optional = [group.get(name) for group in groups for name in self._optional]
        return [*chain.from_iterable(map(self._get_values, groups)), *optional]

    def _keep_values(self, optimizer: FusedStep, values: list[object]) -> None:
        self._values = []  # until all is done: an interrupt may come between
        self._hypers = optimizer._scalars() if self.uses_kernels else []
        self._values_mutate = not all(v is None or isinstance(v, (float, int)) for v in values)
        self._values = values

    def _others_changed(self, optimizer: FusedStep, params: Sequence[Tensor]) -> bool:
        """Whether a parameter that the kernels do not take must be looked at again."""
        groups = optimizer.param_groups
        for i, _, where in self._reconsidered:
            grad = params[i].grad
            if grad is not None and grad.layout == torch.sparse_coo and not is_traced():
                check_ids(grad._indices(), params[i].shape, where)
        if any(params[i].grad is not None for i in self._idle) or any(
            optimizer._refusal(params[i], grad, groups[index]) is None
            for i, index, _ in self._reconsidered
            if (grad := params[i].grad) is not None
        ):
            return True
        steady = [params[i] for i in self._steady]
        grads = [param.grad for param in steady]
        tensors = [*grads, *steady]
        guard = self._guard
        return not (guard.check(tensors) or guard.check_rows(tensors, present_of(grads)))

    def move_strays(self) -> None:
        """Bring state to its parameter's device and memory order."""
        for param, state, name in self._strays:
            state[name] = moved(param, state[name])
        self._strays.clear()

    @_gc_paused()
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

    def norm(self, rest: Iterable[Tensor], gate: Gate) -> Tensor:
        """The norm of all gradients, over all ranks: float64 [], valid until the next step.

        Args:
            rest: the parameters that go torch's own way.
        """
        dense = (table for table in self._tables if isinstance(table, DenseTable))
        norms = [table.sum_squares(gate) for table in dense]
        grads = (param.grad for param in rest if param.grad is not None)
        return grad_norm.total(norms, grad_norm.square_sums(grads, gate.grad_scale))

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
        params = [*all_params(optimizer)]
        for table in self._tables:
            table.hand_over_state(optimizer, params)
        places = {id(param): i for i, param in enumerate(optimizer.state)}
        for table in self._tables:
            table.remember_places(places, params)


def all_params(optimizer: Optimizer) -> Iterable[Tensor]:
    return chain.from_iterable(map(_PARAMS, optimizer.param_groups))


def _lengths(optimizer: FusedStep) -> list[int]:
    return [*map(len, map(_PARAMS, optimizer.param_groups))]


def _named(optimizer: Optimizer) -> Iterator[tuple[Tensor, int, str]]:
    """Every parameter, the index of its group, and what it is in words."""
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            yield param, index, describe(group, index, position)


def look_at(shard: Tensor, grad: Tensor, *, by_rows: bool) -> Look:
    """Of a parameter that the kernels take."""
    if not by_rows:
        return Look(Layout.of(shard), Layout.of(grad), True, None, is_aligned([grad.data_ptr()]))
    values = grad._values() if grad.layout == torch.sparse_coo else grad
    aligned = is_aligned([address_of(values)])
    return Look(Layout.of(shard), None, True, kind_of(grad), aligned)


def _check_insisting(param: Tensor, where: str, reason: str) -> None:
    message = f"`fused=True` cannot be kept for {where}: {reason}"
    if not param.is_cpu or backend.DEVICE_TYPE == "cpu":
        raise RuntimeError(f"{message}; leave `fused` out and torch's own way takes it")
    warnings.warn(f"{message}; torch's for-loop steps it", stacklevel=2)


def differ(objects: Iterable[object], others: Sequence[object]) -> bool:
    """Whether these are not the very same objects. A tensor's == would compare its elements."""
    objects = [*objects]
    return len(objects) != len(others) or any(map(is_not, objects, others))
