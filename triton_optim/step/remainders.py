"""Which parameters were written since the step that made their remainders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import increment_version

from ..tensors.sharding import local

_Written = tuple[int, int]


class Remainders:
    """What torch's version counters and addresses of both were after a parameter's latest update.

    A remainder that was made or loaded since is taken to belong to its parameter. Writes that torch
    does not count are not noticed: those through `.data`, and by a CUDA graph's replay.
    """

    def __init__(self) -> None:
        # by the id of a remainder, which another one can have later: of that and of its parameter
        self._seen: dict[int, tuple[_Written, _Written]] = {}

    def keep(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Parameters and remainders, which belong together now. Of DTensors, the shards."""
        self._seen.update(
            (id(remainder), (_written(remainder), _written(param))) for param, remainder in pairs
        )

    def stale(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The remainders of parameters that were written since."""
        seen = self._seen.get
        return [
            remainder
            for param, remainder in pairs
            if (kept := seen(id(remainder))) is not None
            and kept[1] != _written(param)
            and kept[0] == _written(remainder)
        ]

    def drop(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let parameters that were written since have no remainder."""
        if stale := self.stale(pairs):
            torch._foreach_zero_(stale)

    def forget(self) -> None:
        """State was replaced."""
        self._seen.clear()


def check_counted_apart(params: Iterable[tuple[Tensor, str]]) -> None:
    """Refuse parameters that were cut from one tensor: torch counts their writes together.

    A step of one would look like a write of the other from outside, at every step.

    Args:
        params: each with its description.

    Raises:
        RuntimeError: there are some.
    """
    by_memory = defaultdict(list)
    for param, where in params:
        shard = local(param)
        if shard.dtype == torch.bfloat16 and not (shard.is_meta or shard.is_inference()):
            by_memory[shard.untyped_storage().data_ptr()].append((shard, where))
    for (first, where), *others in by_memory.values():
        for other, where_other in others:
            if first is not other and _share_a_counter(first, other):
                raise RuntimeError(
                    f"{where} and {where_other} were cut from one tensor, so that torch counts "
                    "their writes together, and master_weight_bits=32 cannot tell which of them "
                    "was written; give each memory of its own, as .clone() makes it"
                )


def _share_a_counter(one: Tensor, other: Tensor) -> bool:
    with _unsafe_preserve_version_counter(one):
        before = other._version
        increment_version(one)
        return other._version != before


def _written(tensor: Tensor) -> _Written:
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()
