"""Which parameters were written since the step that made their remainders."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Remainders:
    """What torch's version counters and addresses of parameters were after their latest update.

    A remainder that was made or loaded since is taken to belong to its parameter. Writes that torch
    does not count are not noticed: those through `.data`, and by a CUDA graph's replay.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  # by the id of a remainder, which state holds

    def keep(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Parameters and remainders, which belong together now. Of DTensors, the shards."""
        self._seen.update((id(remainder), _written(param)) for param, remainder in pairs)

    def stale(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The remainders of parameters that were written since."""
        return [
            remainder
            for param, remainder in pairs
            if self._seen.get(id(remainder), now := _written(param)) != now
        ]

    def forget(self) -> None:
        """State was replaced."""
        self._seen.clear()


def _written(param: Tensor) -> tuple[int, int]:
    return 0 if param.is_inference() else param._version, param.data_ptr()
