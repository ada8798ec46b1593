"""Steps and other state of one number a tensor, where the host counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_float
from itertools import chain, cycle
from operator import itemgetter

import torch
from torch import Tensor

from ..scalar_state import Numbers, ScalarState
from .step_counts import HostCounts, StepPool

_read, _after = itemgetter(0), itemgetter(1)


class HostScalars:
    """Advances what each tensor has, once for all that are alike.

    Args:
        state: the rule's.
        counters: the steps of all tensors, then each scalar of all. They are not kept.
        groups: of each tensor.
        pool: where some of them may be from.
    """

    def __init__(
        self,
        state: ScalarState,
        counters: Sequence[Tensor],
        groups: Sequence[int],
        pool: StepPool,
    ) -> None:
        self._n, self._groups, self._advance = len(groups), groups, state.advance
        steps, scalars = counters[: self._n], counters[self._n :]
        self._steps, self._scalars = HostCounts(steps, pool), HostCounts(scalars, pool)
        double = any(scalar.dtype == torch.float64 for scalar in scalars)
        self._rounded: Callable[[float], float] = float if double else _to_float32
        self._old: Sequence[float] = ()
        self._new: Sequence[float] = ()

    def values(
        self, counters: Sequence[Tensor], hypers: Sequence[float | Tensor], n_hypers: int
    ) -> Sequence[float]:
        """What a rule's function is given, tensor by tensor.

        Args:
            hypers: of all groups, `n_hypers` each.
        """
        n = self._n
        steps, scalars = self._steps.values(counters[:n]), self._scalars.values(counters[n:])
        each = (scalars[start : start + n] for start in range(0, len(scalars), n))
        keys = [*zip(self._groups, steps, *each, strict=True)]
        found: dict[tuple[float, ...], tuple[Numbers, Numbers]] = {}
        for key in set(keys):
            group, step, *values = key
            hyper = hypers[int(group) * n_hypers : (int(group) + 1) * n_hypers]
            found[key] = self._advance(step, tuple(values), hyper, self._rounded)
        results = [*map(found.__getitem__, keys)]
        self._old = scalars
        self._new = [*chain.from_iterable(zip(*map(_after, results), strict=True))]
        return [*chain.from_iterable(map(_read, results))]

    def add(self, counters: Sequence[Tensor], present: bytes | None) -> None:
        """Count the update for which `values` were, of each tensor or of those present."""
        n = self._n
        self._steps.add(counters[:n], present)
        new = self._new
        if present is not None:
            either = zip(self._old, self._new, cycle(present), strict=False)
            new = [after if here else before for before, after, here in either]
        self._scalars.set(counters[n:], new)


def _to_float32(value: float) -> float:
    return c_float(value).value
