"""Random numbers by counter: the same for an element of a tensor, wherever it is stepped.

Philox 4x32 (Salmon et al. 2011) of 7 rounds, the fewest that pass its authors' tests with one to
spare. A call makes 128 bits, 16 for each of 8 elements that follow one another in the whole tensor.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
KEY = tl.constexpr(0x243F6A8885A308D3)  # the same in every call: what differs is in the counter

# How the elements that a rank holds lie in the whole tensor. In rows of `columns` elements, each
# `pitch` after the last, the first of them at `offset`:
CONSECUTIVE = tl.constexpr(0)  # in one row, and offset is a multiple of 8
EIGHTS = tl.constexpr(1)  # all three are multiples of 8
SINGLY = tl.constexpr(2)


@triton.jit
def _four_words(group, key, step, SLOT: tl.constexpr):
    """128 bits of the `group`-th eight elements. group: a block of int64."""
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32) ^ (SLOT << 29)
    c2 = low * 0 + ((key & 0xFFFFFFFF) + step).to(tl.uint32)
    c3 = low * 0 + (key >> 32).to(tl.uint32)
    return tl.philox(KEY, low, high, c2, c3, ROUNDS)


@triton.jit
def random_bits(start, random, SLOT: tl.constexpr, N: tl.constexpr, SHARDING: tl.constexpr):
    """16 bits for each of N elements: a block of uint32, below 2^16.

    Args:
        start: of the first among those that the rank holds; a multiple of 8.
        random: int64 scalars: offset, columns and pitch, a key of the tensor, and how often it was
            updated.
        SLOT: 0 for a parameter, 1 and more for its states.
        SHARDING: one of the three above.
    """
    offset, columns, pitch, key, step = random
    if SHARDING == SINGLY:
        local = start + tl.arange(0, N)
        element = offset + local // columns * pitch + local % columns
        a, b, c, d = _four_words(element >> 3, key, step, SLOT)
        lane = element & 7
        word = tl.where(lane < 4, tl.where(lane < 2, a, b), tl.where(lane < 6, c, d))
        return tl.where(lane & 1 == 0, word & 0xFFFF, word >> 16)
    else:
        group = start // 8 + tl.arange(0, N // 8)
        if SHARDING == EIGHTS:
            columns, pitch = columns // 8, pitch // 8
            group = group // columns * pitch + group % columns
        a, b, c, d = _four_words(group + offset // 8, key, step, SLOT)
        # joined so, a thread's 8 elements are those of one call, and nothing is exchanged
        words = tl.join(tl.join(a, c), tl.join(b, d))
        return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (N,))
