"""Loads, stores and roots that give the same bits compiled and interpreted.

Arithmetic is float32, or float64 for float64 parameters. Square root and division are IEEE, but not
with the flag APPROXIMATE: where everything that a rule writes is rounded stochastically.
"""

import triton
import triton.language as tl

from .flags import flag

APPROXIMATE = flag("APPROXIMATE")
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sqrt(x, FLAGS: tl.constexpr = 0):
    """Square root, correctly rounded. x: a float32 or float64 block."""
    if APPROXIMATE & FLAGS or x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div(x, y, FLAGS: tl.constexpr = 0):
    """x / y, correctly rounded. x, y: blocks of one dtype, float32 or float64."""
    if APPROXIMATE & FLAGS or x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def sign(x):
    """-1, 0 or 1, in x's dtype; 0 of NaN, as torch. x: a float32 or float64 block."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def reciprocal(x):
    """1 / x to an ulp or two. x: a float64 scalar of float32's range.

    Newton's iteration, because a float64 division is a subroutine whose registers spill.
    """
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2.0 - x * y)
    return y * (2.0 - x * y)


@triton.jit
def power(base, exponent):
    """base**exponent by squaring. base: a float64 scalar; exponent: a block of int32, 0 or more."""
    result = tl.full(exponent.shape, 1, tl.float64)
    while tl.max(exponent) > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def one_minus_exp2(x, DTYPE: tl.constexpr):
    """1 - 2^x to a few ulp of DTYPE, float32 or float64. x: a float64 scalar, 0 or less."""
    NEAR: tl.constexpr = -0.0625 if DTYPE == tl.float64 else -1.0
    y = (x * LN_2).to(DTYPE)
    series = tl.full((), 1, DTYPE)  # (e^y - 1) / y, from where on 1 - 2^x would cancel
    for i in tl.static_range(9, 1, -1):
        series = 1 + y * (1 / i) * series
    return tl.where(x < NEAR, 1 - tl.exp2(x.to(DTYPE)), -y * series)


@triton.jit
def lerp(start, end, weight):
    """start + weight * (end - start), from the nearer end, as torch. weight: a scalar."""
    near = weight < 0.5
    factor = tl.where(near, weight, weight - 1).to(start.dtype)
    return tl.where(near, start, end) + factor * (end - start)


# Triton's interpreter truncates float32 to bfloat16 and mangles bfloat16 subnormals, where the
# hardware is exact; there, bfloat16 is converted bit by bit.
INTERPRETED = tl.constexpr(not isinstance(sqrt, triton.runtime.JITFunction))


@triton.jit
def _bfloat16_to_float32(x):
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _float32_to_bfloat16(x):
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return tl.where(x == x, rounded, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode(x, COMPUTE_DTYPE: tl.constexpr):
    """x in arithmetic precision. x: a block of any storage dtype."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return _bfloat16_to_float32(x).to(COMPUTE_DTYPE)
    else:
        return x.to(COMPUTE_DTYPE)


@triton.jit
def encode(x, STORAGE_DTYPE: tl.constexpr):
    """x as it is stored, rounded to nearest even. x: a block in arithmetic precision."""
    if STORAGE_DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
        return _float32_to_bfloat16(x) if INTERPRETED else x.to(tl.bfloat16)
    else:
        return x.to(STORAGE_DTYPE)
