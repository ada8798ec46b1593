"""Floating point in 8 bits, with an exponent for each group of elements that follow one another.

E5M3, for what is never negative: 5 bits of exponent, 3 of mantissa, no sign and no zero, so that a
denominator never becomes 0. E4M3, with a sign: 4 bits of exponent, 3 of mantissa, and a zero.

The largest element of a group decides its exponent, a power of two: one that is decoded and encoded
again keeps its value, whatever exponent it has then. The two largest codes mean infinity and NaN.
"""

import triton
import triton.language as tl

GROUP_SIZE = tl.constexpr(256)  # a warp's elements at 8 a thread: their largest needs no barrier

INFINITE = tl.constexpr(0x7F800000)  # bits of float32
ROOM = tl.constexpr((3 << 20) - 1)  # so that no finite number is rounded up to these two
LOWEST = tl.constexpr(32)  # exponent of zero-filled state, biased as float32's: 2^-126 in E5M3
HIGHEST = tl.constexpr(253)  # in E4M3
TO_SUBNORMAL = tl.constexpr(2.0**-112)
FROM_SUBNORMAL = tl.constexpr(2.0**112)


@triton.jit
def _float32(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _group_exponents(sizes):
    """Biased exponents for groups of these bits of magnitudes, of which infinite ones do not count.

    sizes: a block of int32. Returns one a group.
    """
    finite = tl.where(sizes < INFINITE, sizes, 0)
    groups = tl.reshape(finite, (finite.shape[0] // GROUP_SIZE, GROUP_SIZE))
    return tl.maximum((tl.max(groups, axis=1) + ROOM) >> 23, LOWEST)


@triton.jit
def _of_groups(exponents, N: tl.constexpr):
    """Each element's: a block of N."""
    wide = tl.broadcast_to(exponents[:, None], (N // GROUP_SIZE, GROUP_SIZE))
    return tl.reshape(wide, (N,))


@triton.jit
def encode_e5m3(x, noise):
    """Codes, and the exponents of their groups. x: a block of float32, 0 or more, or NaN.

    noise: see `random_bits`. Both results are uint8, exponents less LOWEST.
    """
    N: tl.constexpr = x.shape[0]
    size = x.to(tl.uint32, bitcast=True).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponents = _group_exponents(size)
    lowest = (_of_groups(exponents, N) - 31) << 23
    code = (tl.maximum(size - lowest, 0) + (noise << 4).to(tl.int32) + 8) >> 20
    code = tl.where(size <= INFINITE, tl.minimum(code, 0xFE), 0xFF)  # infinity's is larger
    return code.to(tl.uint8), (exponents - LOWEST).to(tl.uint8)


@triton.jit
def decode_e5m3(code, exponents):
    """float32 of a block of codes and the exponents of their groups, as they are stored."""
    code = code.to(tl.int32)
    lowest = (exponents.to(tl.int32) + (LOWEST - 31)) << 23
    bits = (code << 20) + _of_groups(lowest, code.shape[0])
    return _float32(tl.where(code < 0xFE, bits, ((code & 1) << 22) + INFINITE))


@triton.jit
def encode_e4m3(x, noise):
    """Codes, and the exponents of their groups. x: a block of float32.

    noise: see `random_bits`. Both results are uint8, exponents less LOWEST.
    """
    N: tl.constexpr = x.shape[0]
    bits = x.to(tl.uint32, bitcast=True).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    exponents = tl.minimum(_group_exponents(size), HIGHEST)
    # With the largest at 2^-112, float32 has this format's exponents in its lowest, subnormals too.
    inverse = _float32((254 - _of_groups(exponents, N)) << 23)
    scaled = (tl.abs(x) * inverse * TO_SUBNORMAL).to(tl.uint32, bitcast=True).to(tl.int32)
    code = tl.minimum((scaled + (noise << 4).to(tl.int32) + 8) >> 20, 0x7D)
    code = tl.where(size < INFINITE, code, tl.where(size == INFINITE, 0x7E, 0x7F))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8), (exponents - LOWEST).to(tl.uint8)


@triton.jit
def decode_e4m3(code, exponents):
    """float32 of a block of codes and the exponents of their groups, as they are stored."""
    code = code.to(tl.int32)
    scale = _float32((exponents.to(tl.int32) + LOWEST) << 23)
    size, sign = code & 0x7F, (code & 0x80) << 24
    x = _float32((size << 20) | sign) * FROM_SUBNORMAL * _of_groups(scale, code.shape[0])
    special = _float32((((size & 1) << 22) + INFINITE) | sign)
    return tl.where(size < 0x7E, x, special)
