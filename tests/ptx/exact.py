"""The instructions of operations.py once more: in whole numbers and exact rationals, one by one."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction as Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """A binary floating-point format."""

    bits: int
    precision: int
    least: int  # exponent of the smallest normal number

    @property
    def infinity(self) -> int:
        ones = (1 << (self.bits - self.precision)) - 1
        return ones << (self.precision - 1)


FORMATS = {
    "f16": Format(16, 11, -14),
    "bf16": Format(16, 8, -126),
    "f32": Format(32, 24, -126),
    "f64": Format(64, 53, -1022),
}
ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip
NAN = -1  # in place of the bits of any NaN


def rounded(value: Fraction, kind: str, negative: bool = False) -> int:
    """The bits of the nearest number, of the even one of two; `negative` is a zero's sign."""
    form = FORMATS[kind]
    sign = (value < 0 or (value == 0 and negative)) << (form.bits - 1)
    size = abs(value)
    exponent = form.least
    if size:
        exponent = max(exponent, size.numerator.bit_length() - size.denominator.bit_length() - 1)
        exponent += size >= Fraction(2) ** (exponent + 1)
    unit = Fraction(2) ** (exponent - form.precision + 1)
    # A carry out of the significand is a carry into the exponent.
    units = round(size / unit)
    return sign | min(units + ((exponent - form.least) << (form.precision - 1)), form.infinity)


def value_of(pattern: int, kind: str) -> float:
    """The number that has these bits; any format's is a float64."""
    if kind == "bf16":
        kind, pattern = "f32", pattern << 16
    letter = {"f16": "He", "f32": "If", "f64": "Qd"}[kind]
    number: float = struct.unpack(letter[1], struct.pack(letter[0], pattern))[0]
    return number


def number_of(pattern: int, kind: str) -> int:
    """An integer type's number."""
    bits = int(kind[1:])
    negative = kind[0] == "s" and pattern >> (bits - 1)
    return pattern - (1 << bits) if negative else pattern


def wrapped(number: int, bits: int) -> int:
    """As many low bits."""
    return number & ((1 << bits) - 1)


def exact_bits(number: float, kind: str) -> int:
    """The bits of a special value, or of a number that the format has."""
    if number != number:
        return NAN
    if math.isinf(number):
        form = FORMATS[kind]
        return form.infinity | ((number < 0) << (form.bits - 1))
    return rounded(Fraction(number), kind, math.copysign(1, number) < 0)


def fma(a: float, b: float, c: float, kind: str) -> int:
    if not all(map(math.isfinite, (a, b, c))):
        if math.isfinite(a) and math.isfinite(b):
            return exact_bits(c, kind)
        return exact_bits(a * b + c, kind)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    zero = math.copysign(1, a) * math.copysign(1, b)
    both = (a == 0 or b == 0) and c == 0
    return rounded(exact, kind, both and zero < 0 and math.copysign(1, c) < 0)


def add(a: float, b: float, kind: str) -> int:
    if not (math.isfinite(a) and math.isfinite(b)):
        return exact_bits(a + b, kind)
    negative = a == b == 0 and math.copysign(1, a) < 0 and math.copysign(1, b) < 0
    return rounded(Fraction(a) + Fraction(b), kind, negative)


def mul(a: float, b: float, kind: str) -> int:
    if not (math.isfinite(a) and math.isfinite(b)):
        return exact_bits(a * b, kind)
    negative = math.copysign(1, a) * math.copysign(1, b) < 0
    return rounded(Fraction(a) * Fraction(b), kind, negative)


def div(a: float, b: float, kind: str) -> int:
    negative = math.copysign(1, a) * math.copysign(1, b) < 0
    if a != a or b != b or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return NAN
    if math.isinf(a) or b == 0:
        return exact_bits(-math.inf if negative else math.inf, kind)
    return rounded(Fraction(0) if math.isinf(b) else Fraction(a) / Fraction(b), kind, negative)


def sqrt(a: float, kind: str) -> int:
    if a != a or a < 0:
        return NAN
    if a == 0 or math.isinf(a):
        return exact_bits(a, kind)
    scale = 2**1200  # beyond what either format's root has
    square = Fraction(a) * scale * scale
    root = math.isqrt(int(square))
    inexact = Fraction(root * root) != square
    return rounded((Fraction(root) + Fraction(int(inexact), 2)) / scale, kind)


def extreme(numbers: Sequence[float], kind: str, least: bool, keeps_nan: bool) -> int:
    held = [x for x in numbers if x == x]
    if len(held) < len(numbers):
        return NAN if keeps_nan or not held else exact_bits(held[0], kind)
    first, *_, last = sorted(held, key=lambda x: (x, math.copysign(1, x)))
    return exact_bits(first if least else last, kind)


def integer(x: float, kind: str, rounding: str) -> int:
    """The nearest that the type has, as bits."""
    bits = int(kind[1:])
    high = (1 << (bits - 1 if kind[0] == "s" else bits)) - 1
    low = -high - 1 if kind[0] == "s" else 0
    if x != x:
        return 0
    if math.isinf(x):
        return wrapped(low if x < 0 else high, bits)
    return wrapped(min(max(ROUNDINGS[rounding](Fraction(x)), low), high), bits)


def flushed(pattern: int, kind: str) -> int:
    """0 of a subnormal, with its sign."""
    form = FORMATS[kind]
    exponent = (pattern >> (form.precision - 1)) & ((1 << (form.bits - form.precision)) - 1)
    return pattern if exponent else pattern & 1 << (form.bits - 1)
