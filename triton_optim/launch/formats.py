"""How each tensor is stored: names of formats, and the table that kernels read of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..rule import Rule, State, StateTensor
from ..storage import EIGHT_BITS, EXPONENTS, REMAINDER
from ..tensors.sharding import GlobalIndex, global_index, local
from . import backend
from .variant import STOCHASTIC, STORAGE_DTYPES


class Stored(NamedTuple):
    """How a parameter and its state are stored."""

    formats: tuple[str, ...]  # the parameter's, then one a state; see kernels/formats.py
    sharding: int = 0  # see kernels/random_bits.py
    row: tuple[int, ...] = (0,) * backend.FORMAT_WIDTH  # of the table of formats

    @property
    def remainder(self) -> int:
        """Its address, or 0."""
        return self.row[4]

    @classmethod
    def of(
        cls,
        param: Tensor,
        state: State,
        names: Sequence[str],
        rule: Rule,
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
        shard, beside = local(param), options.names_beside(param, names)
        states = {item.name: item for item in rule.states}
        formats = [_format_of_param(shard, options)]
        formats += (_format(states[n], local(state[n]).dtype, options) for n in names)
        rounds = not STOCHASTIC.isdisjoint(formats)
        if not beside and not rounds:
            return cls(tuple(formats))
        index = global_index(param, where) if rounds else GlobalIndex()
        key = random_key(options.rounding_seed, *place)
        row = [index.offset, index.columns, index.pitch, key]
        for name in (REMAINDER, *(name + EXPONENTS for name in names)):
            row.append(local(state[name]).data_ptr() if name in beside else 0)
        row += [0] * (backend.FORMAT_WIDTH - len(row))
        return cls(tuple(formats), index.sharding, tuple(row))


def _format_of_param(shard: Tensor, options: Options) -> str:
    if options.keeps_remainder(shard):
        return "bfloat16_remainder"
    return STORAGE_DTYPES[shard.dtype] + "_stochastic" * options.rounds_param(shard)


def _format(item: StateTensor, dtype: torch.dtype, options: Options) -> str:
    if dtype == EIGHT_BITS:
        return "float8_e5m3" if item.is_denominator else "float8_e4m3"
    return STORAGE_DTYPES[dtype] + "_stochastic" * options.rounds_state(item.name, dtype)


def random_key(seed: int, group: int, position: int) -> int:
    """64 bits of a parameter, by which its random numbers differ from those of others: an int64."""
    words = struct.pack("<qqq", seed, group, position)
    key: int = struct.unpack("<q", blake2b(words, digest_size=8).digest())[0]
    return key
