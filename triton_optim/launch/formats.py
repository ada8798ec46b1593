"""How each tensor is stored: names of formats, and the table that kernels read of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..rule import State
from ..storage import REMAINDER
from ..tensors.sharding import GlobalIndex, global_index, local
from . import backend


class Stored(NamedTuple):
    """How a parameter and its state are stored."""

    formats: tuple[str, ...]  # the parameter's, then one a state; see kernels/formats.py
    sharding: int = 0  # see kernels/random_bits.py
    row: tuple[int, ...] = (0,) * backend.FORMAT_WIDTH  # of the table of formats

    @classmethod
    def of(
        cls,
        param: Tensor,
        state: State,
        names: Sequence[str],
        place: tuple[int, int],
        where: str,
        options: Options,
    ) -> Stored:
        """Of a parameter with this state.

        Args:
            names: of the states that the rule updates.
            place: the parameter's group, and where it stands there.
            where: it in words.
        """
        shard, held = local(param), [local(state[name]).dtype for name in names]
        rounds = [options.rounds_param(shard), *map(options.rounds_state, names, held)]
        keeps = options.keeps_remainder(shard)
        formats = tuple(_names([shard.dtype, *held], rounds, keeps))
        if not (keeps or any(rounds)):
            return cls(formats)
        remainder = local(state[REMAINDER]).data_ptr() if keeps else 0
        index = global_index(param, where) if any(rounds) else GlobalIndex()
        key = random_key(options.rounding_seed, *place)
        row = (remainder, index.offset, index.columns, index.pitch, key, 0)
        return cls(formats, index.sharding, row)


def _names(dtypes: Sequence[torch.dtype], rounds: Sequence[bool], keeps: bool) -> Iterator[str]:
    for i, (dtype, is_rounded) in enumerate(zip(dtypes, rounds, strict=True)):
        suffix = "_stochastic" if is_rounded else "_remainder" if keeps and i == 0 else ""
        yield backend.STORAGE_DTYPES[dtype] + suffix


def random_key(seed: int, group: int, position: int) -> int:
    """64 bits of a parameter, by which its random numbers differ from those of others: an int64."""
    words = struct.pack("<qqq", seed, group, position)
    key: int = struct.unpack("<q", blake2b(words, digest_size=8).digest())[0]
    return key
