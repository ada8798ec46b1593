"""The table of instructions that compute: what each does to the bits of its operands.

An instruction that is not here, and is none of `translator.py`'s, raises. One is taught by a line
here and a test of its value in test_operations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from . import floats, integers
from .floats import Array
from .integers import SIGNED, UNSIGNED
from .parser import bits_of

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "f32x2": np.float32}


class Operation(NamedTuple):
    """
    Attributes:
        function: bits of the operands to bits of the result, all unsigned; bool of predicates.
        sources: the operands' PTX types.
        result: the result's PTX type.
    """

    function: Callable[..., Array]
    sources: tuple[str, ...]
    result: str


OPERATIONS: dict[str, Operation] = {}

WIDE = ("16", "32", "64")
INTEGERS = [f"{sign}{bits}" for sign in "su" for bits in WIDE]
BITS = [f"b{bits}" for bits in WIDE]


def number_type(kind: str) -> Any:
    """numpy's, of a PTX type."""
    if kind == "pred":
        return np.bool_
    return FLOATS.get(kind) or (SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(kind)]


def teach(op: str, compute: Callable[..., Array], sources: str, result: str) -> None:
    """Add an instruction.

    Args:
        op: its name, types and all.
        compute: numbers of these types in, numbers of the result's type out.
        sources: PTX types of the operands, with blanks between.
        result: PTX type.
    """
    kinds = tuple(sources.split())
    into = [number_type(kind) for kind in kinds]
    outof = np.bool_ if result == "pred" else UNSIGNED[bits_of(result)]

    def function(*operands: Array) -> Array:
        numbers = (bits.view(kind) for bits, kind in zip(operands, into, strict=True))
        value: Array = compute(*numbers).view(outof)
        return value

    OPERATIONS[op] = Operation(function, kinds, result)


def _as(dtype: Any) -> Callable[[Array], Array]:
    return lambda x: x.astype(dtype)


def _flushing(compute: Callable[..., Array]) -> Callable[..., Array]:
    """With `.ftz`: subnormal operands and results are zeros."""
    return lambda *numbers: floats.flushed(compute(*map(floats.flushed, numbers)))


def _add_float_arithmetic() -> None:
    for kind in ("f32", "f64", "f32x2"):
        two, three = f"{kind} {kind}", f"{kind} {kind} {kind}"
        for rounding in ("", ".rn"):
            teach(f"add{rounding}.{kind}", np.add, two, kind)
            teach(f"sub{rounding}.{kind}", np.subtract, two, kind)
            teach(f"mul{rounding}.{kind}", np.multiply, two, kind)
        teach(f"fma.rn.{kind}", floats.fma, three, kind)
    _add_mixed_precision("bf16", "b16", floats.float32_of)
    _add_mixed_precision("f16", "f16", _as(np.float32))
    for kind in ("f32", "f64"):
        two = f"{kind} {kind}"
        teach(f"div.rn.{kind}", np.divide, two, kind)
        teach(f"sqrt.rn.{kind}", np.sqrt, kind, kind)
        teach(f"neg.{kind}", np.negative, kind, kind)
        teach(f"abs.{kind}", np.abs, kind, kind)
        teach(f"min.{kind}", floats.minimum, two, kind)
        teach(f"max.{kind}", floats.maximum, two, kind)
    teach("min.NaN.f32", floats.minimum_or_nan, "f32 f32", "f32")
    teach("max.NaN.f32", floats.maximum_or_nan, "f32 f32", "f32")
    teach("div.full.f32", floats.approximate_quotient, "f32 f32", "f32")
    teach("sqrt.approx.f32", floats.approximate_root, "f32", "f32")
    teach("sqrt.approx.ftz.f32", _flushing(floats.approximate_root), "f32", "f32")
    teach("ex2.approx.f32", floats.approximate_power_of_2, "f32", "f32")
    teach("ex2.approx.ftz.f32", _flushing(floats.approximate_power_of_2), "f32", "f32")
    teach("div.rn.ftz.f32", _flushing(np.divide), "f32 f32", "f32")
    teach("sqrt.rn.ftz.f32", _flushing(np.sqrt), "f32", "f32")
    teach("rcp.approx.ftz.f64", floats.approximate_reciprocal, "f64", "f64")
    teach("abs.ftz.f32", _flushing(np.abs), "f32", "f32")


def _add_mixed_precision(narrow: str, kind: str, wide: Callable[[Array], Array]) -> None:
    """Of sm_100: a float32 is the last operand, and what it goes with is narrow."""
    teach(f"add.rn.f32.{narrow}", lambda a, c: wide(a) + c, f"{kind} f32", "f32")
    teach(f"sub.rn.f32.{narrow}", lambda a, c: wide(a) - c, f"{kind} f32", "f32")
    fma = f"{kind} {kind} f32"
    teach(f"fma.rn.f32.{narrow}", lambda a, b, c: floats.fma(wide(a), wide(b), c), fma, "f32")


def _add_integer_arithmetic() -> None:
    for kind in INTEGERS:
        two = f"{kind} {kind}"
        teach(f"add.{kind}", np.add, two, kind)
        teach(f"sub.{kind}", np.subtract, two, kind)
        teach(f"mul.lo.{kind}", np.multiply, two, kind)
        teach(f"mad.lo.{kind}", lambda a, b, c: a * b + c, f"{two} {kind}", kind)
        teach(f"div.{kind}", integers.quotient, two, kind)
        teach(f"rem.{kind}", lambda a, b: a - integers.quotient(a, b) * b, two, kind)
        teach(f"min.{kind}", np.minimum, two, kind)
        teach(f"max.{kind}", np.maximum, two, kind)
        teach(f"shr.{kind}", integers.shift_right, f"{kind} u32", kind)
    for sign, half in product("su", (16, 32)):
        kind, wide = f"{sign}{half}", f"{sign}{2 * half}"
        double = _as(number_type(wide))
        teach(f"mul.wide.{kind}", lambda a, b, d=double: d(a) * d(b), f"{kind} {kind}", wide)
        teach(
            f"mad.wide.{kind}",
            lambda a, b, c, d=double: d(a) * d(b) + c,
            f"{kind} {kind} {wide}",
            wide,
        )
    for sign in "su":
        kind = f"{sign}32"
        teach(f"mul.hi.{kind}", integers.high_half, f"{kind} {kind}", kind)
    for bits in WIDE:
        teach(f"neg.s{bits}", np.negative, f"s{bits}", f"s{bits}")
        teach(f"abs.s{bits}", np.abs, f"s{bits}", f"s{bits}")


def _add_bits() -> None:
    for kind in ("pred", *BITS):
        two = f"{kind} {kind}"
        teach(f"and.{kind}", np.bitwise_and, two, kind)
        teach(f"or.{kind}", np.bitwise_or, two, kind)
        teach(f"xor.{kind}", np.bitwise_xor, two, kind)
        teach(f"not.{kind}", np.invert, kind, kind)
    for kind in BITS:
        teach(f"shl.{kind}", integers.shift_left, f"{kind} u32", kind)
        teach(f"shr.{kind}", integers.shift_right, f"{kind} u32", kind)
    for kind in ("s32", "u32", "s64", "u64"):
        teach(f"bfe.{kind}", integers.extract_bits, f"{kind} u32 u32", kind)
    for kind in ("b32", "b64"):
        teach(f"bfi.{kind}", integers.insert_bits, f"{kind} {kind} u32 u32", kind)
    teach("prmt.b32", integers.permute_bytes, "b32 b32 b32", "b32")


def _add_moves() -> None:
    for kind in ("pred", *BITS, *INTEGERS, "f32", "f64"):
        teach(f"mov.{kind}", lambda a: a, kind, kind)
    for kind in (*BITS, *INTEGERS, "f32", "f64"):
        teach(f"selp.{kind}", _select, f"{kind} {kind} pred", kind)


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _add_comparisons() -> None:
    def taught(name: str, compute: Callable[..., Array], kinds: Iterable[str]) -> None:
        for kind in kinds:
            teach(f"setp.{name}.{kind}", compute, f"{kind} {kind}", "pred")

    def are_numbers(a: Array, b: Array) -> Array:
        result: Array = (a == a) & (b == b)
        return result

    for name, compare in COMPARISONS.items():
        taught(name, compare, BITS + INTEGERS if name in ("eq", "ne") else INTEGERS)
        floating = ("f16", "f32", "f64")
        taught(name, lambda a, b, c=compare: c(a, b) & are_numbers(a, b), floating)
        taught(f"{name}u", lambda a, b, c=compare: c(a, b) | ~are_numbers(a, b), floating)
    for name, compare in COMPARISONS.items():
        for suffix, unordered in (("", False), ("u", True)):
            compute = _of_bfloat16(compare, are_numbers, unordered)
            teach(f"setp.{name}{suffix}.bf16", compute, "b16 b16", "pred")
    for name, usual in UNSIGNED_NAMES.items():
        taught(name, COMPARISONS[usual], (f"u{bits}" for bits in WIDE))
    taught("num", are_numbers, ("f32", "f64"))
    taught("nan", lambda a, b: ~are_numbers(a, b), ("f32", "f64"))


def _of_bfloat16(
    compare: Callable[..., Array], are_numbers: Callable[..., Array], unordered: bool
) -> Callable[..., Array]:
    """A comparison of bits of bfloat16; of NaN it is `unordered`."""

    def compute(a: Array, b: Array) -> Array:
        x, y = floats.float32_of(a), floats.float32_of(b)
        return np.where(are_numbers(x, y), compare(x, y), unordered)

    return compute


def _add_conversions() -> None:
    # 8 bits stand in a wider register; the translator narrows operands and widens results.
    every = [f"{sign}{bits}" for sign in "su" for bits in ("8", *WIDE)]
    for source, result in product(every, every):
        if source != result:
            compute = _as(number_type(result))
            teach(f"cvt.{result}.{source}", compute, source, result)
    for integer, kind in product(every, ("f32", "f64")):
        teach(f"cvt.rn.{kind}.{integer}", _as(number_type(kind)), integer, kind)
        for rounding in floats.ROUNDINGS:
            to = number_type(integer)
            teach(
                f"cvt.{rounding}.{integer}.{kind}",
                lambda x, t=to, r=rounding: floats.integer_of(x, t, r),
                kind,
                integer,
            )
    for narrow, wide in (("f16", "f32"), ("f16", "f64"), ("f32", "f64")):
        teach(f"cvt.{wide}.{narrow}", _as(FLOATS[wide]), narrow, wide)
        teach(f"cvt.rn.{narrow}.{wide}", _as(FLOATS[narrow]), wide, narrow)
    teach("cvt.f32.bf16", floats.float32_of, "b16", "f32")
    teach("cvt.rn.bf16.f32", floats.bfloat16_of, "f32", "b16")
    teach("cvt.rn.bf16x2.f32", _pair(floats.bfloat16_of), "f32 f32", "b32")
    teach("cvt.rn.f16x2.f32", _pair(lambda x: x.astype(np.float16)), "f32 f32", "b32")


def _pair(narrow: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """The first operand goes into the upper half."""

    def compute(high: Array, low: Array) -> Array:
        upper, lower = (narrow(x).view(np.uint16).astype(np.uint32) for x in (high, low))
        result: Array = (upper << np.uint32(16)) | lower
        return result

    return compute


_add_float_arithmetic()
_add_integer_arithmetic()
_add_bits()
_add_moves()
_add_comparisons()
_add_conversions()
