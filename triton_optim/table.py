"""The tensors that the kernels update on one device, and what a launch reads about them."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import runtime
from .layout import LayoutGuard
from .ways import State

if TYPE_CHECKING:
    from .fused import FusedStep

_STEP = itemgetter("step")


class Entry(NamedTuple):
    """One parameter that the kernels take."""

    param: Tensor
    grad: Tensor
    group: int
    flags: frozenset[str]
    state_names: tuple[str, ...]
    reordered: bool  # the gradient must be copied into the parameter's memory order first


class Found(NamedTuple):
    """What one step reads and writes, looked up and checked for this step."""

    grads: list[Tensor]
    addresses: list[int]  # of grads
    written: list[Tensor]  # parameters and state


class Bucket(NamedTuple):
    """What one launch updates."""

    variant: runtime.Variant
    blocks: Tensor
    block_size: int


class Table:
    """Everything one device's launches need, made once and kept while the tensors stay.

    It remembers addresses and layouts and holds no state tensor, so that state which is moved away
    frees its memory. What may change from step to step (gradient addresses, hyperparameters, step
    counts) is one buffer, sent in one copy when it did change.
    """

    def __init__(
        self, optimizer: FusedStep, device: torch.device, entries: Sequence[Entry]
    ) -> None:
        self._rule = optimizer._rule
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
        self._columns = _columns(entries, self._states)
        self._counted = self._states if optimizer._counts_steps else []

        grads = [entry.grad for entry in entries]
        written = [*self._params, *_values(_columns(entries, complete))]
        steps = map(_STEP, complete) if optimizer._counts_steps else ()
        self.first: Found | None = Found(grads, _addresses(grads), written)
        self._guard = LayoutGuard([*grads, *written])
        self._addresses = _addresses([*written, *steps])
        self._grads = self.first.addresses
        self._misaligned = _misaligned(self._grads)

        rows, self._buckets = _buckets(optimizer, device, entries, complete)
        self._allocate(optimizer, device, rows)

    def _allocate(self, optimizer: FusedStep, device: torch.device, rows: Tensor) -> None:
        """The buffer of what changes: gradient addresses, hyperparameters, step counts."""
        reads_step = any(bucket.variant.reads_step for bucket in self._buckets)
        self._sends_steps = reads_step and (self._pack is None or self._pack.device != device)
        n_groups = len(optimizer.param_groups)
        width = len(optimizer._hyperparameters(optimizer.param_groups[0]))
        n_steps = len(self._params) if self._sends_steps else 0
        lengths = [n + n % 2 for n in (len(self._params), n_groups * width, n_steps)]
        self._buffer = torch.empty(sum(lengths), dtype=torch.int64, device=device)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        grads, hypers, steps = torch.split(self._buffer, lengths)
        self._hypers = hypers.view(torch.float64)
        self._tables = runtime.Tables(
            rows=rows,
            grads=grads,
            hypers=self._hypers[: n_groups * width].view(n_groups, width),
            steps=steps.view(torch.float64) if self._sends_steps else self._pack,
        )
        self._sent: object = None

    def find(self) -> Found | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, everything has the layout that it
        had, and gradients the alignment.
        """
        grads = [param.grad for param in self._params]
        try:
            written = [*self._params, *_values(self._columns)]
            if not self._guard.check([*grads, *written]):
                return None
            if _addresses(chain(written, map(_STEP, self._counted))) != self._addresses:
                return None
        except (KeyError, TypeError):  # state was removed, or a step is no tensor any more
            return None
        addresses = _addresses(grads)
        if addresses != self._grads:
            if _misaligned(addresses) != self._misaligned:
                return None
            self._grads = addresses
        return Found(grads, addresses, written)  # type: ignore[arg-type]

    def run(self, found: Found, hypers: list[float | Tensor]) -> None:
        """Launch the updates, one a bucket, and count the steps."""
        grads, addresses, written = found
        copies = {
            i: torch.empty_like(self._params[i], dtype=grads[i].dtype) for i in self._reordered
        }
        if copies:
            addresses = list(addresses)
        for i, copy in copies.items():
            addresses[i] = copy.copy_(grads[i]).data_ptr()
        self._send(addresses, hypers)
        for bucket in self._buckets:
            runtime.launch(self._rule, *bucket, self._tables)
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
            for tensor in (*tables, *(bucket.blocks for bucket in self._buckets)):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def _send(self, grads: list[int], hypers: list[float | Tensor]) -> None:
        """Bring the buffer up to date; a scalar that lives on a GPU is copied on the device."""
        on_gpu = {i: h for i, h in enumerate(hypers) if isinstance(h, Tensor)}
        values = [None if isinstance(h, Tensor) else h for h in hypers]
        steps: list[float] = []
        if self._sends_steps:
            # A pack that is not on this device is on the CPU: reading it waits for no device.
            steps = self._seen if self._pack is None else self._pack.tolist()
        content = (grads, values, steps)
        if content != self._sent:
            floats = array("d", [0.0 if value is None else value for value in values])
            columns = _joined(array("q", grads), floats, array("d", steps))
            self._buffer.copy_(_sendable(columns, self._buffer.device), non_blocking=True)
            self._sent = content
        for i, value in on_gpu.items():
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


def _columns(entries: Sequence[Entry], states: Sequence[State]) -> dict[str, list[State]]:
    """By name of the tensors that the rule updates, those of `states` that hold one."""
    columns = defaultdict(list)
    for entry, state in zip(entries, states, strict=True):
        for name in entry.state_names:
            columns[name].append(state)
    return columns


def _values(columns: Mapping[str, Sequence[State]]) -> list[Tensor]:
    return list(chain.from_iterable(map(itemgetter(n), states) for n, states in columns.items()))


def _packed(steps: Sequence[Tensor], device: torch.device) -> Tensor:
    """One tensor of all step counts: one operation counts them all.

    On the CPU, unless one of them lies on a GPU: reading that one here would wait for the GPU.
    """
    home = torch.device("cpu") if all(step.is_cpu for step in steps) else device
    double = any(step.dtype == torch.float64 for step in steps)
    dtype = torch.float64 if double else torch.float32
    return torch.stack([step.to(home, dtype).view(()) for step in steps])


def _buckets(
    optimizer: FusedStep,
    device: torch.device,
    entries: Sequence[Entry],
    states: Sequence[State],
) -> tuple[Tensor, list[Bucket]]:
    """The table of rows, and what each launch updates."""
    rows = array("q")
    members: dict[runtime.Variant, list[int]] = defaultdict(list)
    numels = [e.param.numel() * (2 if e.param.is_complex() else 1) for e in entries]
    for i, (entry, state) in enumerate(zip(entries, states, strict=True)):
        updated = [state[name] for name in entry.state_names]
        addresses = _addresses([entry.param, *updated])
        rows.extend(runtime.row(numels[i], entry.group, addresses))
        if numels[i]:
            members[_variant(optimizer, entry, updated, addresses)].append(i)
    buckets = []
    for variant, indices in members.items():
        size = runtime.block_size(variant, (numels[i] for i in indices))
        blocks = _block_table(indices, [-(-numels[i] // size) for i in indices])
        blocks = _sendable(blocks, device).to(device, non_blocking=True)
        buckets.append(Bucket(variant, blocks, size))
    table = _joined(rows).view(-1, runtime.ROW_WIDTH)
    return _sendable(table, device).to(device, non_blocking=True), buckets


def _variant(
    optimizer: FusedStep, entry: Entry, states: Sequence[Tensor], addresses: Sequence[int]
) -> runtime.Variant:
    grads = () if entry.reordered else (entry.grad.data_ptr(),)
    return runtime.Variant(
        flags=entry.flags,
        n_states=len(states),
        param_dtype=runtime.STORAGE_DTYPES[entry.param.dtype],
        grad_dtype=runtime.STORAGE_DTYPES[entry.grad.dtype],
        state_dtype=runtime.STORAGE_DTYPES[(states[0] if states else entry.param).dtype],
        aligned=not any(a % runtime.ALIGNMENT for a in (*addresses, *grads)),
        reads_step=not entry.flags.isdisjoint(optimizer._step_flags),
    )


def _block_table(tensors: Sequence[int], counts: Sequence[int]) -> Tensor:
    """One int64 a block: tensor << 32 | index of the block within the tensor."""
    n_blocks = torch.tensor(counts, device="cpu")
    tensor = torch.repeat_interleave(torch.tensor(tensors, device="cpu"), n_blocks)
    first = torch.repeat_interleave(n_blocks.cumsum(0) - n_blocks, n_blocks)
    return tensor << 32 | torch.arange(len(tensor), device="cpu") - first


def _joined(*columns: array[int] | array[float]) -> Tensor:
    """8-byte columns one after another, each padded to 16 bytes, as one int64 host tensor."""
    content = bytearray()
    for column in columns:
        content += column.tobytes()
        content += bytes(8 * (len(column) % 2))
    return torch.frombuffer(content, dtype=torch.int64)


def _sendable(host: Tensor, device: torch.device) -> Tensor:
    """`host` where an asynchronous copy to `device` can read it.

    torch's caching allocator owns the pinned memory, and does not hand it out again before the
    copy is done.
    """
    return host.pin_memory() if device.type == "cuda" else host


def _misaligned(addresses: Sequence[int]) -> list[int]:
    return [i for i, address in enumerate(addresses) if address % runtime.ALIGNMENT]


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
