"""What lanes do together, against the manual's description lane by lane."""

from __future__ import annotations

from functools import reduce
from random import Random

import numpy as np
import pytest
from ptx_machine import lanes
from ptx_machine.floats import Array
from small_kernels import array, launch

VALUES = np.arange(1000, 1064, dtype=np.uint32)  # of two warps


def _everywhere(value: int) -> Array:
    return np.full(64, value, np.uint32)


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
@pytest.mark.parametrize("clamp", [31, 0, 0x101F & 0x1F1F, 0x181F, 0x1C00])
def test_shuffle(mode: str, clamp: int) -> None:
    for distance in (0, 1, 5, 16, 31):
        got, inside = lanes.shuffle(mode, VALUES, _everywhere(distance), _everywhere(clamp))
        segment, limit = clamp >> 8 & 31, clamp & 31
        for thread in range(64):
            lane = thread % 32
            low, high = lane & segment, (lane & segment) | (limit & ~segment & 31)
            source = {
                "idx": low | (distance & ~segment & 31), "up": lane - distance,
                "down": lane + distance, "bfly": lane ^ distance,
            }[mode]  # fmt: skip
            found = source >= high if mode == "up" else source <= high
            expected = VALUES[thread - lane + source] if found else VALUES[thread]
            assert (got[thread], inside[thread]) == (expected, found)


@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize("name", ["min", "max", "add"])
def test_reductions(name: str, kind: str) -> None:
    random = Random(0)
    values = np.array([random.randrange(2**32) for _ in range(64)], np.uint32)
    got = lanes.reduction(name, kind)(values)
    for warp in (slice(0, 32), slice(32, 64)):
        numbers = [int(v) for v in values[warp].view(np.int32 if kind == "s32" else np.uint32)]
        expected = {"min": min(numbers), "max": max(numbers), "add": sum(numbers)}[name]
        assert (got[warp] == expected % 2**32).all()


def test_reductions_of_bits() -> None:
    random = Random(0)
    values = np.array([random.randrange(2**32) for _ in range(32)], np.uint32)
    for name, join in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        assert lanes.reduction(name, "b32")(values)[0] == reduce(join, map(int, values))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count: int, transposed: bool) -> None:
    """Each lane gets the two numbers that the manual's figure gives it, and gives them back."""
    threads = lanes.row_threads(64, count)
    addresses = np.flatnonzero(threads)
    rows = [(addresses * 100 + column).astype(np.uint16) for column in range(8)]
    got = lanes.fragments(rows, count, transposed)
    for matrix in range(count):
        for thread in range(64):
            lane, warp = thread % 32, thread // 32
            numbers = []
            for i in range(2):
                row, column = lane // 4, 2 * (lane % 4) + i
                if transposed:
                    row, column = column, row
                numbers.append((32 * warp + 8 * matrix + row) * 100 + column)
            assert got[matrix][thread] == numbers[0] | numbers[1] << 16
    again = lanes.rows_of(got, transposed)
    assert all((a == b).all() for a, b in zip(again, rows, strict=True))


def test_instructions_across_lanes() -> None:
    values = array(64)
    body = """
        ld.global.b32 %r10, [%rd2];
        shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;
        shfl.sync.up.b32 %r12|%p1, %r10, 1, 0, -1;
        redux.sync.max.s32 %r13, %r10, -1;
        @!%p1 add.s32 %r11, %r11, 1000;
        mad.lo.s32 %r11, %r13, 10000, %r11;
        st.global.b32 [%rd2], %r11;
    """
    launch(body, values)
    lane = np.arange(64)
    expected = (lane // 32 * 32 + 31) * 10000 + (lane ^ 1) + 1000 * (lane % 32 == 0)
    assert (values == expected).all()


def test_matrices_through_shared_memory() -> None:
    """Stored by rows and loaded transposed: the lanes' numbers of the transposed matrix."""
    values = array(32)
    body = """
        shl.b32 %r8, %r2, 4;
        add.s32 %r9, %r4, %r8;
        ld.global.b32 %r10, [%rd2];
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r10};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r11}, [%r9];
        st.global.b32 [%rd2], %r11;
    """
    values[:] = [2 * i | (2 * i + 1) << 16 for i in range(32)]
    launch(body, values, threads=32)
    transposed = np.arange(64, dtype=np.uint16).reshape(8, 8).T
    assert (values == np.ascontiguousarray(transposed).view(np.uint32).ravel()).all()


def test_comparisons_of_pairs() -> None:
    """Of (1, -2) and (0.5, -2), in bfloat16, the low half first."""
    one, half, minus_two = 0x3F80, 0x3F00, 0xC000
    values = array(64)
    body = f"""
        mov.b32 %r10, {minus_two << 16 | one};
        mov.b32 %r11, {minus_two << 16 | half};
        setp.gt.bf16x2 %p1|%p2, %r10, %r11;
        selp.b32 %r12, 1, 0, %p1;
        selp.b32 %r13, 2, 0, %p2;
        or.b32 %r12, %r12, %r13;
        st.global.b32 [%rd2], %r12;"""
    launch(body, values)
    assert (values == 1).all()
