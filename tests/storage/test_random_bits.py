"""The random numbers of stochastic rounding: Philox's, and the same however they are found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cases import DEVICE
from philox import philox
from torch import Tensor

from triton_optim.kernels import random_bits
from triton_optim.launch.formats import random_key


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _draw(  # type: ignore[no-untyped-def]
    out_ptr, offset, columns, pitch, key, step,
    SLOT: tl.constexpr, SHARDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    random = (
        tl.full((), offset, tl.int64), tl.full((), columns, tl.int64),
        tl.full((), pitch, tl.int64), tl.full((), key, tl.int64), tl.full((), step, tl.int64),
    )  # fmt: skip
    bits = random_bits.random_bits(start, random, SLOT, BLOCK, SHARDING)
    tl.store(out_ptr + start + tl.arange(0, BLOCK), bits.to(tl.int32))


def drawn(
    sharding: int = 0,
    offset: int = 0,
    columns: int = 1 << 40,
    pitch: int = 1 << 40,
    *,
    n: int = 512,
    block: int = 256,
    key: int = 123456789012345,
    step: int = 7,
    slot: int = 0,
) -> Tensor:
    out = torch.empty(n, dtype=torch.int32, device=DEVICE)
    _draw[(n // block,)](out, offset, columns, pitch, key, step, slot, sharding, block)
    return out.cpu()


def test_bits_are_those_of_philox() -> None:
    """Of Salmon et al., of 7 rounds: the counter is the element's eighth, slot, step and key."""
    expected = []
    for group in range(4):
        words = philox((group, 1 << 29, (12345 + 7) % 2**32, 9), 0x243F6A8885A308D3, rounds=7)
        expected += [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert drawn(n=32, block=32, key=12345 + (9 << 32), slot=1).tolist() == expected


def test_bits_do_not_depend_on_blocks_or_on_how_they_are_found() -> None:
    whole = drawn(n=512)
    for block in (32, 128, 512):
        assert torch.equal(drawn(n=512, block=block), whole)
    for offset in (8, 104):
        assert torch.equal(drawn(0, offset, n=256), whole[offset : offset + 256])
    for offset in (1, 3, 13, 160):
        assert torch.equal(drawn(2, offset, n=256), whole[offset : offset + 256])
    rows = whole.view(16, 32)
    for sharding, start, columns in ((1, 8, 16), (2, 8, 16), (2, 3, 4), (2, 31, 1)):
        part = rows[:, start : start + columns].flatten()
        got = drawn(sharding, start, columns, 32, n=16 * columns, block=16)
        assert torch.equal(got, part), (sharding, start, columns)
    far = (1 << 35) + 24  # elements
    assert torch.equal(drawn(0, far, n=64, block=64), drawn(2, far, n=64, block=64))


def test_other_steps_keys_and_slots_have_other_bits() -> None:
    streams = [
        drawn(),
        *(drawn(step=step) for step in (8, 7 + 2**32 - 1)),
        *(drawn(key=key) for key in (random_key(0, 0, 1), random_key(0, 1, 0), -5)),
        *(drawn(slot=slot) for slot in (1, 2, 3)),
        drawn(offset=1 << 35),
    ]
    for i, stream in enumerate(streams):
        # 16 bits, evenly: 512 of them, each bit with a standard deviation of 11.3
        ones = torch.stack([(stream >> k & 1).sum() for k in range(16)])
        assert ((ones - 256).abs() < 5 * 11.3).all()
        for other in streams[:i]:
            assert (stream == other).sum() < 4
    assert torch.equal(drawn(key=-5), drawn(key=-5))
