"""What a launch reads about its tensors, as columns of 8-byte values, and the launch itself."""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import runtime
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


def rows_and_members(
    optimizer: FusedStep, entries: Sequence[Entry], states: Sequence[State]
) -> tuple[Tensor, dict[runtime.Variant, dict[int, int]]]:
    """The table of rows; and by variant, how many elements of which entries it updates."""
    rows: list[int] = []
    members: dict[runtime.Variant, dict[int, int]] = defaultdict(dict)
    for i, (entry, state) in enumerate(zip(entries, states, strict=True)):
        updated = [state[name] for name in entry.state_names]
        addresses = addresses_of([entry.param, *updated])
        numel = entry.param.numel() * (2 if entry.param.is_complex() else 1)
        rows += runtime.row(numel, entry.group, addresses)
        if numel:
            members[_variant(optimizer, entry, updated, addresses)][i] = numel
    return as_tensor(column("q", rows)).view(-1, runtime.ROW_WIDTH), members


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


def launch(
    rule: str,
    variant: runtime.Variant,
    device: torch.device,
    numels: Mapping[int, int],
    tables: runtime.Tables,
) -> runtime.Launch:
    """The launch that updates one variant's members."""
    config = runtime.config(variant, numels.values(), device)
    chunks = chunk_table([*numels], [-(-n // config.chunk) for n in numels.values()])
    chunks = sendable(chunks, device).to(device, non_blocking=True)
    n_bytes = variant.bytes_per_element * sum(numels.values())
    return runtime.Launch(rule, variant, config, chunks, tables, n_bytes)


def chunk_table(tensors: Sequence[int], counts: Sequence[int]) -> Tensor:
    """One int64 a chunk: tensor << 32 | index of the chunk within the tensor."""
    n_chunks = torch.tensor(counts, device="cpu")
    tensor = torch.repeat_interleave(torch.tensor(tensors, device="cpu"), n_chunks)
    first = torch.repeat_interleave(n_chunks.cumsum(0) - n_chunks, n_chunks)
    return tensor << 32 | torch.arange(len(tensor), device="cpu") - first


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


def sendable(host: Tensor, device: torch.device) -> Tensor:
    """`host` where an asynchronous copy to `device` can read it.

    torch's caching allocator owns the pinned memory, and does not hand it out again before the
    copy is done.
    """
    return host.pin_memory() if device.type == "cuda" else host
