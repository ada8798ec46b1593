"""State of one number a tensor beside its step, of rules that keep some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .options import Group

Rounding = Callable[[float], float]
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class ScalarState:
    """State of one number a tensor, and what a rule's function is given of it instead of the step.

    Args:
        initial: by name, the value before the first update of a parameter group's tensors.
        reads: how many float64 scalars the function is given: one, or a tuple of several.
        advance: `(step, values, hyper, rounded)`, where the host counts: how many updates there
            were before this one, the values, the group's `hyper`, and what rounds to the dtype in
            which the values are kept. Returns what the function is given, and the values after the
            update, as tuples.
        kernel: the same as a `@triton.jit` function `(step, values, hyper, DTYPE)`, where the
            device counts: of float64 blocks, and the dtype in which the values are kept. None where
            Triton is not installed.
    """

    initial: Mapping[str, Callable[[Group], float | Tensor]]
    reads: int
    advance: Callable[[float, Numbers, Sequence[float | Tensor], Rounding], tuple[Numbers, Numbers]]
    kernel: Any

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.initial)
