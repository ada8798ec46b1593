"""What the 32 lanes of a warp do together: shuffles, reductions and matrices in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .floats import Array

WARP = 32
REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.sum, "min": np.min, "max": np.max, "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


def shuffle(mode: str, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """`shfl.sync`: each lane's value of a, from the lane that it names, and whether there is one.

    Args:
        mode: "idx", "up", "down" or "bfly".
        a: values.
        b: the lane, or the distance to it.
        c: the last lane that may be read, and 8 bits higher the bits that lanes must share.
    """
    threads = np.arange(len(a))
    lane = threads % WARP
    b, c = b.astype(np.int64) & 31, c.astype(np.int64)
    segment, clamp = (c >> 8) & 31, c & 31
    low, high = lane & segment, (lane & segment) | (clamp & ~segment)
    source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": low | (b & ~segment)}[mode]
    inside = source >= high if mode == "up" else source <= high
    return a[threads - lane + np.where(inside, source, lane)], inside


def reduction(name: str, kind: str) -> Callable[[Array], Array]:
    """`redux.sync`: what every lane of a warp gets of all 32."""
    reduce, dtype = REDUCTIONS[name], np.int32 if kind == "s32" else np.uint32

    def compute(a: Array) -> Array:
        result = reduce(a.view(dtype).reshape(-1, WARP), axis=1).astype(dtype)
        return np.repeat(result, WARP).view(np.uint32)

    return compute


# A matrix has 8 rows of 8 numbers of 16 bits. Lane 8 m + r gives the address of row r of matrix m,
# and lane l holds two numbers of each: those of row l / 4 at columns 2 (l % 4) and the next, or
# transposed.


def row_threads(n_threads: int, count: int) -> Array:
    """Which threads give an address."""
    mask: Array = np.arange(n_threads) % WARP < 8 * count
    return mask


def fragments(rows: Sequence[Array], count: int, transposed: bool) -> list[Array]:
    """What each lane gets.

    Args:
        rows: by column, of the threads that gave an address.
        count: matrices.
    """
    matrices = np.stack(rows, 1).reshape(-1, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
    return [np.ascontiguousarray(pairs[:, m]).reshape(-1) for m in range(count)]


def rows_of(values: Sequence[Array], transposed: bool) -> list[Array]:
    """What `fragments` was made of."""
    pairs = np.stack([value.reshape(-1, WARP) for value in values], 1)
    matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, len(values), 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    return [np.ascontiguousarray(matrices[..., i]).reshape(-1) for i in range(8)]
