"""The tensors that the kernels update on one device, and what a launch reads about them."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import runtime
from .layout import LayoutGuard
from .ways import State

if TYPE_CHECKING:
    from .fused import FusedStep


class Entry(NamedTuple):
    """One parameter that the kernels take."""

    param: Tensor
    grad: Tensor
    group: int
    flags: frozenset[str]
    state_names: tuple[str, ...]
    reordered: bool  # the gradient must be copied into the parameter's memory order first


class Bucket(NamedTuple):
    """What one launch updates."""

    variant: runtime.Variant
    blocks: Tensor
    block_size: int


class Table:
    """Everything one device's launches need, made once and kept while the tensors stay.

    Making one adds the state that a first step needs. What may change from step to step (gradient
    addresses, hyperparameters, step counts) is one buffer, sent in one copy when it did change.
    """

    def __init__(
        self, optimizer: FusedStep, device: torch.device, entries: Sequence[Entry]
    ) -> None:
        grads = [entry.grad for entry in entries]
        self.params = [entry.param for entry in entries]
        self._rule = optimizer._rule
        self._reordered = [i for i, entry in enumerate(entries) if entry.reordered]
        self._guard = LayoutGuard(grads)
        self._grads = _addresses(grads)
        self._misaligned = _misaligned(self._grads)

        self._seen, states = _complete_state(optimizer, entries)
        self._pack = _pack_steps(device, states) if optimizer._counts_steps else None
        updated = [
            [state[name] for name in entry.state_names]
            for entry, state in zip(entries, states, strict=True)
        ]
        self._written = [*self.params, *chain.from_iterable(updated)]
        self._addresses = _addresses(self._written)

        rows, self._buckets = _buckets(optimizer, device, entries, updated)
        reads_step = any(bucket.variant.reads_step for bucket in self._buckets)
        self._sends_steps = reads_step and (self._pack is None or self._pack.device != device)
        n_groups = len(optimizer.param_groups)
        width = len(optimizer._hyperparameters(optimizer.param_groups[0]))
        n_steps = len(entries) if self._sends_steps else 0
        lengths = [len(entries), n_groups * width, n_steps]
        self._buffer = torch.empty(sum(map(_even, lengths)), dtype=torch.int64, device=device)
        grad_column, hypers, steps = torch.split(self._buffer, [*map(_even, lengths)])
        self._hypers = hypers.view(torch.float64)
        self._tables = runtime.Tables(
            rows=rows,
            grads=grad_column,
            hypers=self._hypers[: n_groups * width].view(n_groups, width),
            steps=steps.view(torch.float64) if self._sends_steps else self._pack,
        )
        self._sent: object = None

    def addresses(self, grads: Sequence[Tensor | None]) -> list[int] | None:
        """Addresses of `grads`, or None where this table no longer describes its tensors.

        It does while parameters and state are where they were, and gradients have the layout and
        the alignment that they had.
        """
        if not self._guard.check(grads) or _addresses(self._written) != self._addresses:
            return None
        addresses = _addresses(grads)
        if addresses != self._grads:
            if _misaligned(addresses) != self._misaligned:
                return None
            self._grads = addresses
        return addresses

    def run(self, grads: list[Tensor], addresses: list[int], hypers: list[float | Tensor]) -> None:
        """Launch the updates, one a bucket, and count the steps."""
        copies = {
            i: torch.empty_like(self.params[i], dtype=grads[i].dtype) for i in self._reordered
        }
        for i, copy in copies.items():
            addresses[i] = copy.copy_(grads[i]).data_ptr()
        self._send(addresses, hypers)
        for bucket in self._buckets:
            runtime.launch(self._rule, *bucket, self._tables)
        if self._pack is not None:
            self._pack.add_(1)
        self._seen = [1.0] * len(self.params)
        increment_version(self._written)

    def _send(self, grads: list[int], hypers: list[float | Tensor]) -> None:
        """Bring the buffer up to date; a scalar that lives on a GPU is copied on the device."""
        on_gpu = {i: h for i, h in enumerate(hypers) if isinstance(h, Tensor) and not h.is_cpu}
        values = [0.0 if i in on_gpu else float(h) for i, h in enumerate(hypers)]
        steps: list[float] = []
        if self._sends_steps:
            steps = self._seen if self._pack is None else self._pack.tolist()
        content = (grads, values, steps)
        if content != self._sent or on_gpu:
            columns = _joined(array("q", grads), array("d", values), array("d", steps))
            self._buffer.copy_(_sendable(columns, self._buffer.device), non_blocking=True)
            self._sent = content
        for i, value in on_gpu.items():
            self._hypers[i].copy_(value.view(()), non_blocking=True)


def _complete_state(
    optimizer: FusedStep, entries: Sequence[Entry]
) -> tuple[list[float], list[State]]:
    """1.0 or 0.0 an entry, whether it has had an update; and its state, made where missing."""
    seen, states = [], []
    for entry in entries:
        state = optimizer.state[entry.param] if entry.state_names else {}
        seen.append(float(optimizer._has_state(state)))
        if entry.state_names and not seen[-1]:
            state.update(optimizer._new_state(entry.param, optimizer.param_groups[entry.group]))
        states.append(state)
    return seen, states


def _pack_steps(device: torch.device, states: Sequence[State]) -> Tensor:
    """One tensor of all step counts, of which each state's `step` becomes an element.

    On the CPU, unless one of them lies on a GPU: reading that one here would wait for the GPU.
    """
    steps: list[Tensor] = [state["step"] for state in states]
    home = torch.device("cpu") if all(step.is_cpu for step in steps) else device
    pack = torch.stack([step.to(home, steps[0].dtype).view(()) for step in steps])
    for state, step in zip(states, pack.unbind(), strict=True):
        state["step"] = step
    return pack


def _buckets(
    optimizer: FusedStep,
    device: torch.device,
    entries: Sequence[Entry],
    updated: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, list[Bucket]]:
    """The table of rows, and what each launch updates."""
    rows = array("q")
    members: dict[runtime.Variant, list[int]] = defaultdict(list)
    numels = [e.param.numel() * (2 if e.param.is_complex() else 1) for e in entries]
    for i, (entry, states) in enumerate(zip(entries, updated, strict=True)):
        addresses = _addresses([entry.param, *states])
        rows.extend(runtime.row(numels[i], entry.group, addresses))
        if numels[i]:
            members[_variant(optimizer, entry, states, addresses)].append(i)
    buckets = []
    for variant, indices in members.items():
        size = runtime.block_size(numels[i] for i in indices)
        blocks = _block_table(indices, [-(-numels[i] // size) for i in indices])
        blocks = _sendable(blocks, device).to(device, non_blocking=True)
        buckets.append(Bucket(variant, blocks, size))
    return _sendable(_joined(rows), device).to(device, non_blocking=True), buckets


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
    n_blocks = torch.tensor(counts)
    tensor = torch.repeat_interleave(torch.tensor(tensors), n_blocks)
    first = torch.repeat_interleave(n_blocks.cumsum(0) - n_blocks, n_blocks)
    return tensor << 32 | torch.arange(len(tensor)) - first


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


def _even(n: int) -> int:
    return n + n % 2


def _misaligned(addresses: Sequence[int]) -> list[int]:
    return [i for i, address in enumerate(addresses) if address % runtime.ALIGNMENT]


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
