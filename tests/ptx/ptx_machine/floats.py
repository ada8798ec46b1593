"""IEEE arithmetic as PTX defines it, on arrays of one number a thread."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
_fma64 = np.frompyfunc(_libm.fma, 3, 1)

BFLOAT16_NAN = np.uint16(0x7FFF)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64, rounded once: the C library's."""
    result: Array = _fma64(a, b, c).astype(np.float64)
    return result


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there, which a second rounding, to
    float32, does not show (Boldo and Melquiond 2008).
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)  # Knuth: exactly what rounding took
    bits = total.view(np.int64)
    inexact = (lost != 0) & ((bits & 1) == 0) & np.isfinite(total)
    if inexact.any():
        away = np.where((lost > 0) == (total > 0), 1, -1)
        total = (bits + np.where(inexact, away, 0)).view(np.float64)
    result: Array = total.astype(np.float32)
    return result


def fma(a: Array, b: Array, c: Array) -> Array:
    return fma64(a, b, c) if a.dtype == np.float64 else fma32(a, b, c)


def flushed(x: Array) -> Array:
    """Subnormals as zeros of their sign (`.ftz`)."""
    tiny = np.abs(x) < np.finfo(x.dtype).tiny
    return np.where(tiny, np.copysign(x.dtype.type(0), x), x)


def approximate_quotient(a: Array, b: Array) -> Array:
    """`div.full.f32`, which may err by 2 ulp: the quotient, and by its operands -2 to 2 ulp more.

    There is no error where b is a power of 2, nor in tiny quotients.
    """
    mixed = a.view(np.uint32) * np.uint32(2654435761) ^ b.view(np.uint32) * np.uint32(2246822519)
    power_of_2 = b.view(np.uint32) & np.uint32(0x7FFFFF) == 0
    return np.where(power_of_2, a / b, _off_by_ulps(a / b, mixed))


def approximate_power_of_2(x: Array) -> Array:
    """`ex2.approx`, which may err by 2 ulp, likewise; there is no error where x is whole."""
    exact = np.exp2(x.astype(np.float64)).astype(np.float32)
    mixed = x.view(np.uint32) * np.uint32(2654435761)
    return np.where(x == np.rint(x), exact, _off_by_ulps(exact, mixed))


def approximate_root(x: Array) -> Array:
    """`sqrt.approx`, which may err by 2^-23 of itself: the root, or one of its neighbours."""
    mixed = x.view(np.uint32) * np.uint32(2654435761)
    with np.errstate(invalid="ignore"):
        root = np.sqrt(x)
    off = ((mixed >> np.uint32(7)) % np.uint32(3)).astype(np.int32) - 1
    moved = (root.view(np.int32) + off.astype(np.int32)).view(np.float32)
    return np.where(np.isfinite(root) & (root > 1e-30), moved, root)


def approximate_reciprocal(x: Array) -> Array:
    """`rcp.approx.ftz.f64`: of the upper halves of bits alone, without subnormals."""
    high = np.uint64(0xFFFFFFFF00000000)
    with np.errstate(divide="ignore"):
        result = 1 / flushed((x.view(np.uint64) & high).view(np.float64))
    return flushed((result.view(np.uint64) & high).view(np.float64))


def _off_by_ulps(exact: Array, mixed: Array) -> Array:
    """A number -2 to 2 ulp away, by some bits; not of tiny ones."""
    off = ((mixed >> np.uint32(7)) % np.uint32(5)).astype(np.int32) - 2
    moved = (exact.view(np.int32) + off.astype(np.int32)).view(np.float32)
    usual = np.isfinite(exact) & np.isfinite(moved) & (np.abs(exact) > 1e-30)
    return np.where(usual, moved, exact)


def bfloat16_of(x: Array) -> Array:
    """The bits of float32 as bfloat16, to nearest even; one NaN."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(x == x, rounded.astype(np.uint16), BFLOAT16_NAN)


def float32_of(bits: Array) -> Array:
    """float32 of the bits of bfloat16."""
    result: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return result


def minimum(a: Array, b: Array) -> Array:
    """The number, of a number and a NaN; -0 is below +0."""
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    """The number, of a number and a NaN; +0 is above -0."""
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))


def minimum_or_nan(a: Array, b: Array) -> Array:
    return np.where((a == a) & (b == b), minimum(a, b), np.nan).astype(a.dtype)


def maximum_or_nan(a: Array, b: Array) -> Array:
    return np.where((a == a) & (b == b), maximum(a, b), np.nan).astype(a.dtype)


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def integer_of(x: Array, kind: Any, rounding: str) -> Array:
    """x as an integer type of numpy: the nearest it has; 0 of NaN."""
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    whole = ROUNDINGS[rounding](x.astype(np.float64))
    below, above = whole < float(low), whole >= float(high)  # 2**63 - 1 is 2**63 in float64
    inside = np.where((whole == whole) & ~below & ~above, whole, 0).astype(kind)
    return np.where(above, kind(high), np.where(below, kind(low), inside))
