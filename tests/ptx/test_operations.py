"""Every instruction that computes, against whole numbers and exact rationals."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import exact
import numpy as np
import pytest
from exact import FORMATS, NAN, exact_bits, number_of, value_of, wrapped
from ptx_machine import floats
from ptx_machine.floats import Array
from ptx_machine.integers import UNSIGNED
from ptx_machine.operations import OPERATIONS
from ptx_machine.parser import bits_of

N = 64  # operands that are tried of each instruction
FLOAT_TYPES = ("f16", "f32", "f64", "f32x2")
INTEGER_SIGNS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "lo": operator.mul, "min": min, "max": max,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge, "lo": operator.lt, "ls": operator.le,
    "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def _patterns(kind: str, random: Random) -> list[int]:
    """Bits of operands: the extremes of a type, small numbers and any."""
    bits = bits_of(kind)
    if kind == "pred":
        return [random.randrange(2) for _ in range(N)]
    if kind not in FORMATS:
        edges = [0, 1, 2, 7, 31, 32, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
        return [random.choice([*edges, random.randrange(2**bits)]) for _ in range(N)]
    form = FORMATS[kind]
    one = exact.rounded(Fraction(1), kind)
    magnitudes = [
        0, 1, 2, (1 << (form.precision - 1)) - 1, 1 << (form.precision - 1), one, one + 1,
        form.infinity - 1, form.infinity, form.infinity + 1, form.infinity + (form.infinity >> 9),
    ]  # fmt: skip

    def magnitude() -> int:
        near_one = one + random.randrange(-(4 << form.precision), 4 << form.precision)
        return random.choice(
            [random.choice(magnitudes), near_one, random.randrange(2 ** (bits - 1))]
        )

    return [magnitude() | random.randrange(2) << (bits - 1) for _ in range(N)]


def _expected(op: str, operands: Sequence[int]) -> int | None:
    """The result's bits; None where any of several is right."""
    head, *middle, kind = op.split(".")
    if op.startswith(("div.full", "ex2.approx", "rcp.approx", "sqrt.approx")):
        return None  # test_an_approximate_quotient, ..._root, ..._power and ..._reciprocal
    if kind == "bf16" and head == "setp":
        numbers = [value_of(operand, kind) for operand in operands]
        return _float_result(head, middle, kind, numbers, operands)
    if kind in ("bf16", "f16") and head in ("add", "sub", "fma"):
        *narrow, wide = operands
        numbers = [*(value_of(operand, kind) for operand in narrow), value_of(wide, "f32")]
        return _float_result(head, [], "f32", numbers, operands)
    if kind == "bf16" or (head == "cvt" and middle[-1].startswith(("bf16", "f16x2"))):
        return _narrow_pair(middle[-1], operands)
    if head == "cvt":
        return _converted(middle, kind, operands[0])
    if head == "mov":
        return operands[0]
    if head == "selp":
        return operands[0] if operands[2] else operands[1]
    if kind in FLOAT_TYPES:
        return _float_result(head, middle, kind, [value_of(o, kind) for o in operands], operands)
    return _integer_result(head, middle, kind, operands)


def _float_result(
    head: str, middle: list[str], kind: str, numbers: list[float], operands: Sequence[int]
) -> int:
    if "ftz" in middle:
        numbers = [value_of(exact.flushed(operand, kind), kind) for operand in operands]
        return exact.flushed(_float_result(head, [], kind, numbers, operands), kind)
    if head == "setp":
        unordered = numbers[0] != numbers[0] or numbers[1] != numbers[1]
        (name,) = middle
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if name in COMPARISONS:
            return not unordered and COMPARISONS[name](*numbers)
        return unordered or COMPARISONS[name.removesuffix("u")](*numbers)
    if head in ("neg", "abs"):
        sign = 1 << (bits_of(kind) - 1)
        changed = operands[0] ^ sign if head == "neg" else operands[0] & ~sign
        return NAN if numbers[0] != numbers[0] else changed
    if head in ("min", "max"):
        return exact.extreme(numbers, kind, head == "min", "NaN" in middle)
    if head == "sub":
        return exact.add(numbers[0], -numbers[1], kind)
    compute: Callable[..., int] = getattr(exact, head)
    return compute(*numbers, kind)


def _narrow_pair(narrow: str, operands: Sequence[int]) -> int | None:
    """Of bfloat16, and of two numbers in one register."""
    if narrow == "f32":
        return exact_bits(value_of(operands[0], "bf16"), "f32")
    kind = narrow.removesuffix("x2")
    total = 0
    for operand in operands:
        half = exact_bits(value_of(operand, "f32"), kind)
        if half == NAN and kind == "f16":
            return None
        half = 0x7FFF if half == NAN else half
        total = total << 16 | half
    return total


def _converted(middle: list[str], source: str, operand: int) -> int:
    *how, result = middle
    if source in FLOAT_TYPES:
        number = value_of(operand, source)
        if result in FLOAT_TYPES:
            return exact_bits(number, result)
        return exact.integer(number, result, how[0])
    whole = number_of(operand, source)
    if result in FLOAT_TYPES:
        return exact.rounded(Fraction(whole), result)
    return wrapped(whole, bits_of(result))


def _integer_result(head: str, middle: list[str], kind: str, operands: Sequence[int]) -> int:
    bits = bits_of(kind)
    a, *rest = operands if kind == "pred" else [number_of(o, kind) for o in operands]
    if head == "not":
        return wrapped(~a, bits)
    if head in ("neg", "abs"):
        return wrapped(-a if head == "neg" else abs(a), bits)
    if head in ("shl", "shr"):
        n = operands[1]
        return wrapped(a << min(n, 64) if head == "shl" else a >> min(n, 64), bits)
    if head in ("bfe", "bfi", "prmt"):
        return _bit_field(head, kind, operands)
    b, *rest = rest
    if head == "setp":
        return COMPARISONS[middle[0]](a, b)
    if head in ("div", "rem"):
        quotient = int(Fraction(a, b)) if b else -1
        return wrapped(quotient if head == "div" else a - quotient * b, bits)
    if head in ("mul", "mad"):
        if middle == ["wide"]:
            return wrapped(a * b + sum(operands[2:]), 2 * bits)
        return wrapped(a * b >> bits if middle == ["hi"] else a * b + sum(rest), bits)
    return wrapped(INTEGER_SIGNS[head](a, b), bits)


def _bit_field(head: str, kind: str, operands: Sequence[int]) -> int:
    if head == "prmt":
        a, b, selector = operands
        source = (a | b << 32).to_bytes(8, "little")
        picks = [(selector >> 4 * i) & 15 for i in range(4)]
        bytes_ = [255 * (source[p & 7] >> 7) if p & 8 else source[p & 7] for p in picks]
        return int.from_bytes(bytes(bytes_), "little")
    bits = bits_of(kind)
    *values, position, length = operands
    position, length = position & 255, length & 255
    if head == "bfi":
        mask = ((1 << length) - 1) << position
        return wrapped((values[1] & ~mask) | (values[0] << position & mask), bits)
    # As the manual's loop has it, bit by bit.
    last = min(position + length - 1, bits - 1)
    sign = values[0] >> last & 1 if kind[0] == "s" and length else 0
    taken = [
        values[0] >> (position + i) & 1 if i < length and position + i < bits else sign
        for i in range(bits)
    ]
    return sum(bit << i for i, bit in enumerate(taken))


def _array(patterns: Sequence[int], kind: str) -> Array:
    return np.array(patterns, UNSIGNED.get(bits_of(kind), bool))


@pytest.mark.parametrize("op", OPERATIONS)
def test_result(op: str) -> None:
    function, sources, result = OPERATIONS[op]
    halves = op.endswith("f32x2")  # two float32 in a register
    random = Random(op)
    narrow = op.endswith(".bf16")
    kinds = ["bf16" if narrow and kind != "f32" else kind for kind in sources]
    kinds = ["f32"] * len(sources) if halves else kinds
    operands = [_patterns(kind, random) for kind in kinds]
    arrays = [_array(patterns, kind) for patterns, kind in zip(operands, kinds, strict=True)]
    if halves:
        arrays = [array.view(np.uint64) for array in arrays]
    with np.errstate(all="ignore"):
        got = function(*arrays)
    form = "f32" if halves else "bf16" if ".bf16." in op else result
    for i, bits in enumerate(got.view(np.uint32) if halves else got):
        given = [patterns[i] for patterns in operands]
        expected = _expected(op.replace("f32x2", "f32"), given)
        if expected == NAN:
            assert value_of(int(bits), form) != value_of(int(bits), form), given
        elif expected is not None:
            assert int(bits) == int(expected), given


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_rounds_once(kind: str) -> None:
    """Where rounding twice, or the product first, gives something else."""
    random = Random(0)
    half_unit = Fraction(1, 2 ** FORMATS[kind].precision)
    triples = []
    for _ in range(500):
        a, b = (random.choice([1, -1]) * random.uniform(1, 2) * 2.0**random.randrange(-40, 40)
                for _ in range(2))  # fmt: skip
        a, b = (value_of(exact.rounded(Fraction(x), kind), kind) for x in (a, b))
        product = Fraction(a) * Fraction(b)
        nearby = [
            -product,  # all but cancels
            -product * (1 + 2 * half_unit),
            product / half_unit,  # the product is half a unit of the sum
            product / half_unit * (1 + 2 * half_unit),
            product * half_unit,
            Fraction(0),
        ]
        triples += [(a, b, value_of(exact.rounded(c, kind), kind)) for c in nearby]
    dtype = np.float32 if kind == "f32" else np.float64
    got = floats.fma(*np.array(triples, dtype).T.copy()).view(f"u{dtype().itemsize}")
    for triple, bits in zip(triples, got, strict=True):
        assert int(bits) == exact.fma(*triple, kind), triple


@pytest.mark.parametrize("narrow", ["f16", "bf16"])
def test_every_narrow_number_and_every_tie(narrow: str) -> None:
    """Subnormals among them: widened and back, and halfway to the next and a little off."""
    form = FORMATS[narrow]
    patterns = np.arange(form.infinity, dtype=np.uint16)
    wide = OPERATIONS[f"cvt.f32.{narrow}"].function(patterns)
    back = OPERATIONS[f"cvt.rn.{narrow}.f32"].function
    assert (back(wide) == patterns).all()
    low, high = wide.view(np.float32)[:-1].astype(np.float64), wide.view(np.float32)[1:]
    middle = ((low + high) / 2).astype(np.float32)
    even = patterns[:-1] + patterns[:-1] % 2
    normal = middle >= np.finfo(np.float32).tiny * 4  # float32 has the halves of all but these
    assert (back(middle.view(np.uint32))[normal] == even[normal]).all()
    above = np.nextafter(middle, np.float32(np.inf)).view(np.uint32)
    below = np.nextafter(middle, np.float32(-np.inf)).view(np.uint32)
    assert (back(above)[normal] == patterns[1:][normal]).all()
    assert (back(below)[normal] == patterns[:-1][normal]).all()


def test_an_approximate_quotient() -> None:
    """Within 2 ulp, as the manual promises, and not always right."""
    random = Random(0)
    a, b = (np.array([random.uniform(1, 2) for _ in range(N)], np.float32) for _ in range(2))
    got = floats.approximate_quotient(a, b).astype(np.float64)
    error = got - a.astype(np.float64) / b
    assert 2**-26 < np.abs(error / got).max() <= 2.5 * 2**-23
    assert (floats.approximate_quotient(a, np.ones_like(a)) == a).all()
    assert floats.approximate_quotient(a[:1], np.full(1, np.inf, np.float32))[0] == 0


def test_an_approximate_root() -> None:
    x = np.random.default_rng(0).uniform(0, 9, N).astype(np.float32)
    error = floats.approximate_root(x).astype(np.float64) / np.sqrt(x.astype(np.float64)) - 1
    assert 2**-25 < np.abs(error).max() <= 1.5 * 2**-23
    edges = np.array([0, -0.0, np.inf], np.float32)
    assert (floats.approximate_root(edges) == edges).all()
    assert np.isnan(floats.approximate_root(np.array([-1, np.nan], np.float32))).all()


def test_an_approximate_power() -> None:
    random = np.random.default_rng(0)
    x = random.uniform(-100, 100, 1000).astype(np.float32)
    got = floats.approximate_power_of_2(x).astype(np.float64)
    exact = np.exp2(x.astype(np.float64))
    assert 1e-7 < np.max(np.abs(got / exact - 1)) <= 2.5 * 2**-23
    whole = np.array([-149, -3, 0, 5, np.inf, -np.inf], np.float32)
    assert (floats.approximate_power_of_2(whole) == np.exp2(whole)).all()
    flush = OPERATIONS["ex2.approx.ftz.f32"].function
    assert flush(np.array([-130], np.float32).view(np.uint32))[0] == 0


def test_an_approximate_reciprocal() -> None:
    x = np.array([3.0, -7.0, 1e300, 2.0**-1040, np.inf, 0.0])
    got = floats.approximate_reciprocal(x)
    assert (np.abs(got[:3] * x[:3] - 1) < 2**-19).all()
    assert (got[:3].view(np.uint64) % 2**32 == 0).all()
    assert (got[3:] == [np.inf, 0, np.inf]).all()
