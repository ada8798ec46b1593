"""Integer operations as PTX defines them, on arrays of one number a thread."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def quotient(a: Array, b: Array) -> Array:
    """a / b towards zero; all ones where b is 0, which a GPU does not trap."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    down = a // safe
    up = (down < 0) & (down * safe != a)
    return np.where(b == 0, ~np.zeros_like(a), down + up.astype(a.dtype))


def high_half(a: Array, b: Array) -> Array:
    """The upper half of the product of 32-bit numbers."""
    signed = a.dtype == np.int32
    wide = a.astype(np.int64 if signed else np.uint64) * b
    result: Array = (wide >> 32).astype(a.dtype)
    return result


def shift_left(a: Array, n: Array) -> Array:
    bits = a.dtype.itemsize * 8
    inside = np.minimum(n, bits - 1).astype(a.dtype)
    result: Array = np.where(n < bits, a << inside, a.dtype.type(0))
    return result


def shift_right(a: Array, n: Array) -> Array:
    """The sign fills a signed number from above."""
    bits = a.dtype.itemsize * 8
    shifted: Array = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))


def _ones(length: Array, kind: Any) -> Array:
    """As many low bits."""
    bits = np.iinfo(kind).bits
    some = (kind(1) << np.minimum(length, bits - 1).astype(kind)) - kind(1)
    everything: Array = np.full_like(some, np.iinfo(kind).max)
    return np.where(length >= bits, everything, some)


def extract_bits(a: Array, position: Array, length: Array) -> Array:
    """`bfe`: the sign of a signed field fills the bits after its last, which is a's at most."""
    bits = a.dtype.itemsize * 8
    kind = UNSIGNED[bits]
    value = a.view(kind)
    position, length = ((n & np.uint32(255)).astype(np.int64) for n in (position, length))
    shifted = value >> np.minimum(position, bits - 1).astype(kind)
    mask = _ones(np.clip(bits - position, 0, length), kind)
    field: Array = np.where(position < bits, shifted, np.zeros_like(shifted)) & mask
    if a.dtype.kind == "i":
        last = np.clip(position + length - 1, 0, bits - 1).astype(kind)
        negative = ((value >> last) & kind(1)).astype(bool) & (length > 0)
        field = np.where(negative, field | ~mask, field)
    result: Array = field.view(a.dtype)
    return result


def insert_bits(a: Array, b: Array, position: Array, length: Array) -> Array:
    """`bfi`: b with the low bits of a at a position."""
    bits = a.dtype.itemsize * 8
    kind = a.dtype.type
    position, length = ((n & np.uint32(255)).astype(np.int64) for n in (position, length))
    shift = np.minimum(position, bits - 1).astype(kind)
    mask = np.where(position < bits, _ones(length, kind) << shift, kind(0))
    result: Array = (b & ~mask) | ((a << shift) & mask)
    return result


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """`prmt`: four of the bytes of b and a, each picked by a nibble; its top bit picks the sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        shift = (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = ((both >> shift) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result
