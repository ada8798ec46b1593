"""Which parameters were written since the step that made their remainders."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

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


def _written(tensor: Tensor) -> _Written:
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()
