"""Steps and other state of one number a tensor, where the host counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_float
from itertools import chain, cycle, groupby
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
        self._n, self._advance = len(groups), state.advance
        self._runs: list[tuple[int, int, int]] = []  # group, its tensors from and to
        for group, members in groupby(groups):
            start = self._runs[-1][2] if self._runs else 0
            self._runs.append((group, start, start + len([*members])))
        steps, scalars = counters[: self._n], counters[self._n :]
        self._steps, self._scalars = HostCounts(steps, pool), HostCounts(scalars, pool)
        double = any(scalar.dtype == torch.float64 for scalar in scalars)
        self._rounded: Callable[[float], float] = float if double else _to_float32
        self._old: Sequence[float] = ()
        self._new: Sequence[float] = ()

    def values(
        self, counters: Sequence[Tensor], hypers: Sequence[float | Tensor], n_hypers: int
    ) -> Sequence[float]:
        """What a rule's function is given, and the step, tensor by tensor.

        Args:
            hypers: of all groups, `n_hypers` each.
        """
        n = self._n
        self._old = self._scalars.values(counters[n:])
        columns = [self._steps.values(counters[:n])]
        columns += [self._old[start : start + n] for start in range(0, len(self._old), n)]
        results: list[tuple[Numbers, Numbers]] = []
        for group, start, stop in self._runs:
            hyper = hypers[group * n_hypers : (group + 1) * n_hypers]
            results += self._advanced([column[start:stop] for column in columns], hyper)
        self._new = [*chain.from_iterable(zip(*map(_after, results), strict=True))]
        read = zip(map(_read, results), columns[0], strict=True)
        return [*chain.from_iterable((*scalars, step) for scalars, step in read)]

    def _advanced(
        self, columns: Sequence[Sequence[float]], hyper: Sequence[float | Tensor]
    ) -> list[tuple[Numbers, Numbers]]:
        """Of each tensor of a group; what tensors have alike is done once."""
        n = len(columns[0])
        alike = all(column.count(column[0]) == n for column in columns)
        keys = [tuple(column[0] for column in columns)] if alike else [*zip(*columns, strict=True)]
        found = {key: self._advance(key[0], key[1:], hyper, self._rounded) for key in set(keys)}
        return [*map(found.__getitem__, keys)] * (n if alike else 1)

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
