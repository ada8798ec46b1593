"""The tensors that the kernels update on one device: found, checked and stepped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import columns, runtime
from .columns import Entry, addresses_of, alignment, column
from .layout import LayoutGuard
from .ways import State

if TYPE_CHECKING:
    from .fused import FusedStep

_STEP = itemgetter("step")


class Found(NamedTuple):
    """What one step reads and writes, looked up and checked for this step."""

    grads: list[Tensor]
    written: list[Tensor]  # parameters and state


class Table:
    """Everything one device's launches need, made once and kept while the tensors stay.

    It remembers addresses and layouts and holds no state tensor, so that state which is moved away
    frees its memory. What may change from step to step (gradient addresses, hyperparameters, step
    counts) is one buffer, sent in one copy when it did change.

    Args:
        optimizer: its hyperparameters are as many as `hypers`.
        device: where its parameters are.
        entries: the parameters.
        hypers: every group's hyperparameters, one after another.
    """

    def __init__(
        self,
        optimizer: FusedStep,
        device: torch.device,
        entries: Sequence[Entry],
        hypers: Sequence[object],
    ) -> None:
        self._params = [entry.param for entry in entries]
        self._reordered = [i for i, entry in enumerate(entries) if entry.reordered]
        self._states, self._new = _states(optimizer, entries)
        # 0.0 until a tensor's first update, for SGD's rule.
        self._seen = [0.0 if new else 1.0 for new in self._new]
        complete = [{**s, **new} for s, new in zip(self._states, self._new, strict=True)]
        self._pack = None
        if optimizer._counts_steps:
            self._pack = _packed([*map(_STEP, complete)], device)
            for state, new, step in zip(complete, self._new, self._pack.unbind(), strict=True):
                state["step"] = new["step"] = step
        self._holders = _holders(entries, self._states)
        self._counted = self._states if optimizer._counts_steps else []

        grads = [entry.grad for entry in entries]
        written = [*self._params, *_values(_holders(entries, complete))]
        steps = map(_STEP, complete) if optimizer._counts_steps else ()
        self.first: Found | None = Found(grads, written)
        self._guard = LayoutGuard([*grads, *written])
        self._addresses = addresses_of([*written, *steps])
        self._grads = addresses_of(grads)
        self._grad_column = column("q", self._grads)
        self._alignment = alignment(self._grad_column)

        rows, cuts = columns.rows_and_cuts(optimizer, entries, complete)
        self._allocate(
            device,
            rows,
            any(cut.variant.reads_step for cut in cuts),
            len(optimizer.param_groups),
            hypers,
        )
        self._launches = [
            runtime.Launch(
                optimizer._rule,
                cut.variant,
                cut.config,
                columns.on_device(cut.owners, device),
                self._tables,
                cut.n_bytes,
            )
            for cut in cuts
        ]

    def _allocate(
        self,
        device: torch.device,
        rows: Tensor,
        reads_step: bool,
        n_groups: int,
        hypers: Sequence[object],
    ) -> None:
        """The tables; what changes is one buffer: gradient addresses, hyperparameters, steps."""
        self._sends_steps = reads_step and (self._pack is None or self._pack.device != device)
        n_steps = len(self._params) if self._sends_steps else 0
        lengths = [n + n % 2 for n in (len(self._params), len(hypers), n_steps)]
        self._buffer = torch.empty(sum(lengths), dtype=torch.int64, device=device)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        grads, floats, steps = torch.split(self._buffer, lengths)
        self._hypers = floats.view(torch.float64)
        self._tables = runtime.Tables(
            rows=columns.on_device(rows, device),
            grads=grads,
            hypers=self._hypers[: len(hypers)].view(n_groups, -1),
            steps=steps.view(torch.float64) if self._sends_steps else self._pack,
        )
        self._sent: bytes | None = None
        self._hypers_sent: object = None
        self._on_gpu: dict[int, Tensor] = {}

    def find(self) -> Found | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, everything has the layout that it
        had, and gradients the alignment.
        """
        grads = [param.grad for param in self._params]
        try:
            written = [*self._params, *_values(self._holders)]
            if not self._guard.check([*grads, *written]):
                return None
            if addresses_of([*written, *map(_STEP, self._counted)]) != self._addresses:
                return None
        except (KeyError, TypeError):  # state was removed, or a step is no tensor any more
            return None
        addresses = addresses_of(grads)
        if addresses != self._grads:
            grad_column = column("q", addresses)
            if alignment(grad_column) != self._alignment:
                return None
            self._grads, self._grad_column = addresses, grad_column
        return Found(grads, written)  # type: ignore[arg-type]

    def run(self, found: Found, hypers: list[float | Tensor]) -> None:
        """Launch the updates, one a variant, and count the steps."""
        grads, written = found
        copies = {
            i: torch.empty_like(self._params[i], dtype=grads[i].dtype).copy_(grads[i])
            for i in self._reordered
        }
        grad_column = self._grad_column
        if copies:
            read = [copies.get(i, grad) for i, grad in enumerate(grads)]
            grad_column = column("q", addresses_of(read))
        self._send(grad_column, hypers)
        for launch in self._launches:
            launch.run()
        if self._pack is not None:
            self._pack.add_(1)
        elif self._sends_steps:
            self._seen = [1.0] * len(self._params)
        increment_version(written)
        self._outlive_the_stream()

    def _outlive_the_stream(self) -> None:
        """Keep the tables' memory from reuse until a step on another stream than theirs is done."""
        if not self._buffer.is_cuda:
            return
        stream = torch.cuda.current_stream(self._buffer.device)
        if stream != self._stream:
            tables = (self._buffer, self._tables.rows, self._tables.steps)
            for tensor in (*tables, *(launch.owners for launch in self._launches)):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def _send(self, grads: bytes, hypers: list[float | Tensor]) -> None:
        """Bring the buffer up to date; a scalar that lives on a GPU is copied on the device."""
        if hypers is not self._hypers_sent:
            on_gpu = {i: h for i, h in enumerate(hypers) if isinstance(h, Tensor)}
            if on_gpu.keys() != self._on_gpu.keys():
                self._sent = None  # in these places stands what was copied on the device
            self._on_gpu = on_gpu
            floats = [0.0 if isinstance(h, Tensor) else h for h in hypers]
            self._hyper_column = column("d", floats)
            self._hypers_sent = hypers
        content = grads + self._hyper_column
        if self._sends_steps:
            # A pack that is not on this device is on the CPU: reading it waits for no device.
            steps = self._seen if self._pack is None else self._pack.tolist()
            content += column("d", steps)
        if content != self._sent:
            host = columns.sendable(columns.as_tensor(content), self._buffer.device)
            self._buffer.copy_(host, non_blocking=True)
            self._sent = content
        for i, value in self._on_gpu.items():
            self._hypers[i].copy_(value.view(()), non_blocking=True)

    def hand_over_state(self, optimizer: FusedStep) -> None:
        """After the first step: give the optimizer the state that it made."""
        self.first = None
        for param, state, new in zip(self._params, self._states, self._new, strict=True):
            if new:
                state.update(new)
                optimizer.state[param] = state
        self._new = []


def _states(optimizer: FusedStep, entries: Sequence[Entry]) -> tuple[list[State], list[State]]:
    """Every parameter's entry of optimizer.state, and what it lacks before a first update."""
    states, new = [], []
    for entry in entries:
        state = optimizer.state.get(entry.param, {}) if entry.state_names else {}
        complete = not entry.state_names or optimizer._has_state(state)
        group = optimizer.param_groups[entry.group]
        states.append(state)
        new.append({} if complete else optimizer._new_state(entry.param, group))
    return states, new


def _holders(entries: Sequence[Entry], states: Sequence[State]) -> dict[str, list[State]]:
    """By name of the tensors that the rule updates, those of `states` that hold one."""
    holders = defaultdict(list)
    for entry, state in zip(entries, states, strict=True):
        for name in entry.state_names:
            holders[name].append(state)
    return holders


def _values(holders: Mapping[str, Sequence[State]]) -> list[Tensor]:
    return [*chain.from_iterable(map(itemgetter(n), states) for n, states in holders.items())]


def _packed(steps: Sequence[Tensor], device: torch.device) -> Tensor:
    """One tensor of all step counts: one operation counts them all.

    On the CPU, unless one of them lies on a GPU: reading that one here would wait for the GPU.
    """
    home = torch.device("cpu") if all(step.is_cpu for step in steps) else device
    double = any(step.dtype == torch.float64 for step in steps)
    dtype = torch.float64 if double else torch.float32
    return torch.stack([step.to(home, dtype).view(()) for step in steps])
