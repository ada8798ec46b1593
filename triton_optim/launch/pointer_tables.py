"""What launches read about their tensors, as columns of bytes, and how it is sent."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import backend

NOWHERE = backend.ALIGNMENT  # of a gradient without elements: 0 says that there is no gradient

_IS_ALIGNED = bytes(low % backend.ALIGNMENT == 0 for low in range(256))


def addresses_of(tensors: Iterable[Tensor | None]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]


def grad_addresses_of(grads: Iterable[Tensor | None]) -> list[int]:
    """0 of a gradient that is missing, and of no other."""
    return [0 if grad is None else grad.data_ptr() or NOWHERE for grad in grads]


def real_numel(tensor: Tensor) -> int:
    """Elements as the kernels count them: a complex one is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def is_aligned(addresses: Iterable[int]) -> bool:
    return not any(address % backend.ALIGNMENT for address in addresses)


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
    return pin(host, device).to(device, non_blocking=True)


def pin(host: Tensor, device: torch.device) -> Tensor:
    """`host` where an asynchronous copy to `device` can read it.

    torch's caching allocator owns the pinned memory, and does not hand it out again before the
    copy is done.
    """
    return host.pin_memory() if device.type == "cuda" else host
