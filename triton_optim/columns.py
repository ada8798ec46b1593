"""What launches read about their tensors, and how these are cut into programs."""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import runtime
from .tuning import Config
from .ways import State

if TYPE_CHECKING:
    from .fused import FusedStep

_IS_ALIGNED = bytes(low % runtime.ALIGNMENT == 0 for low in range(256))


class Entry(NamedTuple):
    """One parameter that the kernels take."""

    param: Tensor
    grad: Tensor
    group: int
    flags: frozenset[str]
    state_names: tuple[str, ...]
    reordered: bool  # the gradient must be copied into the parameter's memory order first


class Cut(NamedTuple):
    """What one launch updates, cut into programs."""

    variant: runtime.Variant
    config: Config
    owners: Tensor  # int32, one a program: the row of its tensor
    n_bytes: int


def rows_and_cuts(
    optimizer: FusedStep, entries: Sequence[Entry], states: Sequence[State]
) -> tuple[Tensor, list[Cut]]:
    """The table of rows, on the host, and the launches that read it."""
    numels = [e.param.numel() * (2 if e.param.is_complex() else 1) for e in entries]
    updated = [[s[name] for name in e.state_names] for e, s in zip(entries, states, strict=True)]
    addresses = [addresses_of([e.param, *u]) for e, u in zip(entries, updated, strict=True)]
    members: dict[runtime.Variant, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        if numels[i]:
            members[_variant(optimizer, entry, updated[i], addresses[i])].append(i)
    first = [0] * len(entries)
    cuts = []
    for variant, indices in members.items():
        sizes = [numels[i] for i in indices]
        config = runtime.config(variant, sizes, entries[0].param.device)
        counts = [-(-size // config.chunk) for size in sizes]
        for i, place in zip(indices, accumulate(counts, initial=0), strict=False):
            first[i] = place
        n_bytes = variant.bytes_per_element * sum(sizes)
        cuts.append(Cut(variant, config, owners(indices, counts), n_bytes))
    rows: list[int] = []
    for i, entry in enumerate(entries):
        rows += runtime.row(numels[i], entry.group, first[i], addresses[i])
    return as_tensor(column("q", rows)).view(-1, runtime.ROW_WIDTH), cuts


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


def owners(tensors: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Each tensor's row, as often as it has chunks."""
    rows = torch.tensor(tensors, dtype=torch.int32, device="cpu")
    return torch.repeat_interleave(rows, torch.tensor(counts, device="cpu"))


def addresses_of(tensors: Iterable[Tensor | None]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]


def column(typecode: str, values: Sequence[float]) -> bytes:
    """int64 ("q") or float64 ("d") values, padded to 16 bytes."""
    return array(typecode, values).tobytes() + bytes(8 * (len(values) % 2))


def alignment(addresses: bytes) -> bytes:
    """Whether each address of a column is a multiple of ALIGNMENT."""
    lowest_byte = 0 if sys.byteorder == "little" else 7
    return addresses[lowest_byte::8].translate(_IS_ALIGNED)


def as_tensor(columns: bytes) -> Tensor:
    """A host tensor, int64."""
    return torch.frombuffer(bytearray(columns), dtype=torch.int64)


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """`host`, copied to `device` without waiting for it."""
    return sendable(host, device).to(device, non_blocking=True)


def sendable(host: Tensor, device: torch.device) -> Tensor:
    """`host` where an asynchronous copy to `device` can read it.

    torch's caching allocator owns the pinned memory, and does not hand it out again before the
    copy is done.
    """
    return host.pin_memory() if device.type == "cuda" else host
