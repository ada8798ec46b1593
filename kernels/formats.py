"""How tensors are stored: what a block is decoded from, and encoded to.

A format is a number of four bits; FORMATS has the parameter's in its lowest four, and each state's
above. Rules know nothing of it: they compute in arithmetic precision.
"""

import triton
import triton.language as tl

from .chunks import pointer
from .float8 import GROUP_SIZE, decode_e4m3, decode_e5m3, encode_e4m3, encode_e5m3
from .numerics import decode, encode
from .random_bits import random_bits

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
BFLOAT16_STOCHASTIC = tl.constexpr(4)
FLOAT16_STOCHASTIC = tl.constexpr(5)
BFLOAT16_REMAINDER = tl.constexpr(6)  # a float32, rounded, and in another tensor what that lost
FLOAT8_E5M3 = tl.constexpr(7)  # these two are rounded stochastically, too; see float8.py
FLOAT8_E4M3 = tl.constexpr(8)

LARGEST_BFLOAT16 = tl.constexpr(3.3895313892515355e38)
LARGEST_FLOAT16 = tl.constexpr(65504.0)
SMALLEST_NORMAL_FLOAT16 = tl.constexpr(2.0**-14)


@triton.jit
def stored_pointer(address, start, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of a tensor of this format."""
    if FORMAT == FLOAT32:
        return pointer(address, start, tl.float32, ALIGNED)
    elif FORMAT == FLOAT64:
        return pointer(address, start, tl.float64, ALIGNED)
    elif (FORMAT == FLOAT16) | (FORMAT == FLOAT16_STOCHASTIC):
        return pointer(address, start, tl.float16, ALIGNED)
    elif (FORMAT == FLOAT8_E5M3) | (FORMAT == FLOAT8_E4M3):
        return pointer(address, start, tl.uint8, ALIGNED)
    else:
        return pointer(address, start, tl.bfloat16, ALIGNED)


@triton.jit
def join_remainder(x, remainder):
    """The float32 that was split. x: a block of bfloat16; remainder: of int16.

    A zero that was written since has a remainder of another number: 0 is not to become NaN by it.
    """
    high = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    bits = high + remainder.to(tl.int32).to(tl.uint32, bitcast=True)
    wrapped = (bits & 0x7FFFFFFF) >= 0x7FFF0000
    return tl.where(wrapped, high, bits).to(tl.float32, bitcast=True)


@triton.jit
def split_remainder(x):
    """x as bfloat16, to nearest with ties away from zero, and what is missing from it as int16.

    NaN stays NaN whatever is added.
    """
    bits = x.to(tl.uint32, bitcast=True)
    high = tl.where(x == x, (bits + 0x8000) >> 16, 0x7FC0)
    rounded = high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return rounded, bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def round_stochastically(x, noise, FORMAT: tl.constexpr):
    """x rounded to one of its neighbours, to the nearer more often: right in the mean.

    What is infinite, NaN or larger than any finite value of the format is rounded to nearest.

    Args:
        x: a block of float32.
        noise: of uint32, below 2^16, each equally likely.
    """
    if FORMAT == BFLOAT16_STOCHASTIC:
        bits = x.to(tl.uint32, bitcast=True) + noise
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where(tl.abs(x) < LARGEST_BFLOAT16, rounded, encode(x, tl.bfloat16))
    else:
        # Below the normal values of float16 neighbours are as far apart as at the smallest of them.
        subnormal = tl.abs(x) < SMALLEST_NORMAL_FLOAT16
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        shifted = tl.abs(x) + tl.where(subnormal, SMALLEST_NORMAL_FLOAT16, 0.0)
        bits = (shifted.to(tl.uint32, bitcast=True) + (noise >> 3)) & 0xFFFFE000
        size = bits.to(tl.float32, bitcast=True)
        size = size - tl.where(subnormal, SMALLEST_NORMAL_FLOAT16, 0.0)
        rounded = (size.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(x) < LARGEST_FLOAT16, rounded, x).to(tl.float16)


@triton.jit
def pointer_beside(address, start, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """To what the format keeps beside element `start`: its remainder, or its group's exponent."""
    if FORMAT == BFLOAT16_REMAINDER:
        return pointer(address, start, tl.int16, ALIGNED)
    else:
        return address.to(tl.pointer_type(tl.uint8)) + start // GROUP_SIZE


@triton.jit
def load(
    ptr,
    beside_ptr,
    start,
    remaining,
    mask,
    FORMAT: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """A block in arithmetic precision, exactly what is stored.

    Args:
        beside_ptr: see `pointer_beside`; of no format but these.
        start, remaining, mask: as `store` is given them.
    """
    offsets = start + tl.arange(0, BLOCK_SIZE)
    x = tl.load(ptr + offsets, mask=mask, eviction_policy=EVICTION)
    if FORMAT == BFLOAT16_REMAINDER:
        return join_remainder(x, tl.load(beside_ptr + offsets, mask=mask))
    elif FORMAT >= FLOAT8_E5M3:
        groups = start // GROUP_SIZE + tl.arange(0, BLOCK_SIZE // GROUP_SIZE)
        present = None if mask is None else groups * GROUP_SIZE < remaining
        exponents = tl.load(beside_ptr + groups, mask=present)
        if FORMAT == FLOAT8_E5M3:
            return decode_e5m3(x, exponents).to(COMPUTE_DTYPE)
        else:
            return decode_e4m3(x, exponents).to(COMPUTE_DTYPE)
    else:
        return decode(x, COMPUTE_DTYPE)


@triton.jit
def store(
    ptr,
    beside_ptr,
    start,
    remaining,
    mask,
    x,
    random,
    first,
    SLOT: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARDING: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Store a block.

    Args:
        ptr, beside_ptr: as `load` is given them.
        start: the block's first element.
        remaining: elements of the tensor, counted as `start` is.
        mask: which elements of the block there are; None: all.
        first: how many elements this rank holds before those of `ptr`.
        random, SLOT, SHARDING: see `random_bits`; None where no format is stochastic.
    """
    N: tl.constexpr = x.shape[0]
    offsets = start + tl.arange(0, N)
    noise = None
    if (FORMAT == BFLOAT16_STOCHASTIC) | (FORMAT == FLOAT16_STOCHASTIC) | (FORMAT >= FLOAT8_E5M3):
        noise = random_bits(first + start, random, SLOT, N, SHARDING)
    if FORMAT == BFLOAT16_REMAINDER:
        stored, remainder = split_remainder(x)
        tl.store(beside_ptr + offsets, remainder, mask=mask)
    elif (FORMAT == BFLOAT16_STOCHASTIC) | (FORMAT == FLOAT16_STOCHASTIC):
        stored = round_stochastically(x.to(tl.float32), noise, FORMAT)
    elif FORMAT >= FLOAT8_E5M3:
        if mask is not None:  # what is not there has no say in a group's exponent
            x = tl.where(mask, x, 0.0)
        x = x.to(tl.float32)
        if FORMAT == FLOAT8_E5M3:
            stored, exponents = encode_e5m3(x, noise)
        else:
            stored, exponents = encode_e4m3(x, noise)
        groups = start // GROUP_SIZE + tl.arange(0, N // GROUP_SIZE)
        present = None if mask is None else groups * GROUP_SIZE < remaining
        tl.store(beside_ptr + groups, exponents, mask=present)
    else:
        stored = encode(x, ptr.dtype.element_ty)
    tl.store(ptr + offsets, stored, mask=mask, eviction_policy=EVICTION)
