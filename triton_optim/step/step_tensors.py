"""The tensors of one step: looked up anew for each, and never kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, cycle, repeat
from operator import is_not
from typing import NamedTuple

from torch import Tensor

from ..rule import State
from .view import OptimizerView

GradCopies = list[tuple[int, Tensor]]  # what stands in for a gradient, by its index


class CurrentTensors(NamedTuple):
    """The optimizer's tensors as they are now: nothing of it is kept."""

    params: Sequence[Tensor]  # of all groups
    keys: Sequence[Tensor]  # of optimizer.state
    states: Sequence[State]

    @classmethod
    def of(cls, view: OptimizerView, params: Sequence[Tensor]) -> CurrentTensors:
        return cls(params, [*view.state], [*view.state.values()])


class StepTensors(NamedTuple):
    """What one step reads and writes, looked up and checked for this step: shards of DTensors."""

    grads: Sequence[Tensor | None]  # of sparse ones, the values; None of one that is missing
    present: bytes  # 1 of a gradient that is there
    shards: Sequence[Tensor]  # all parameters
    written: Sequence[Tensor]  # parameters that have a gradient, and their state
    dtensors: Sequence[Tensor]  # those of which `written` are shards
    steps: Sequence[Tensor]  # all step counts, then each other scalar of all tensors
    ids: Sequence[Tensor] = ()  # int64 [1, rows], of sparse gradients
    remainders: Sequence[tuple[Tensor, Tensor]] = ()  # written parameters, and theirs

    @property
    def counted(self) -> Iterable[Tensor]:
        """The step counts and other scalars of parameters that have a gradient."""
        return self.steps if 0 not in self.present else compress(self.steps, cycle(self.present))


def present_of(grads: Iterable[Tensor | None]) -> bytes:
    """1 of each that is there."""
    return bytes(map(is_not, grads, repeat(None)))
