"""Accesses to one place of global memory, one of them a store, that nothing orders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .access import MAX_THREADS, Access
from .floats import Array

MAX_RACES = 1000


class Use(NamedTuple):
    """What one thread does to one place."""

    turn: int  # index in the log
    program: int
    thread: int
    access: Access

    def __str__(self) -> str:
        return f"thread {self.thread} of {self.access}, {self.access.kind}s"


class Race(NamedTuple):
    """Two uses of which neither must come first."""

    address: int
    first: Use
    second: Use

    @property
    def load(self) -> Use | None:
        """The load, of a load and a store by one program.

        Several threads may hold one element; all load it, and one stores it. That is no fault if
        nothing depends on what the others load.
        """
        uses = (self.first, self.second)
        if self.first.program == self.second.program:
            kinds = [use.access.kind for use in uses]
            if sorted(kinds) == ["load", "store"]:
                return uses[kinds.index("load")]
        return None

    def __str__(self) -> str:
        return f"race at {self.address:#x}: {self.first} / {self.second}"


class Contested(NamedTuple):
    """What a log says of memory that several threads use, one of them to store.

    Attributes:
        by_programs: whether two programs use one place; if none do, their order does not matter.
    """

    by_programs: bool
    races: list[Race]


def contested(log: Sequence[Access]) -> Contested:
    """Search a log.

    Two uses are ordered in one program by a barrier between; in two programs, by an atomic on one
    address after the first use and before the second, which draws later. Each is by the same thread
    as the use, or there is a barrier between them. The log has one order of programs; what another
    order would change, the runs in other orders show.
    """
    if not log:
        return Contested(False, [])
    grain = min(access.size for access in log)
    places, turns, threads = _flattened(log, grain)
    programs = np.array([access.program for access in log])[turns]
    stores = np.array([access.kind != "load" for access in log])[turns]
    order = np.lexsort((turns, places))
    places, turns, threads, programs, stores = (
        column[order] for column in (places, turns, threads, programs, stores)
    )
    starts = np.flatnonzero(np.r_[True, np.diff(places) != 0])
    stops = np.r_[starts[1:], len(places)]
    user = programs * MAX_THREADS + threads
    stored = np.logical_or.reduceat(stores, starts)
    chosen = stored & (np.maximum.reduceat(user, starts) != np.minimum.reduceat(user, starts))
    by_programs = stored & (
        np.maximum.reduceat(programs, starts) != np.minimum.reduceat(programs, starts)
    )
    atomics = _Atomics(log)
    races: list[Race] = []
    for i in np.flatnonzero(chosen):
        members = slice(starts[i], stops[i])
        uses = [
            Use(int(turn), log[turn].program, int(thread), log[turn])
            for turn, thread in zip(turns[members], threads[members], strict=True)
        ]
        for first, second in _pairs(uses):
            if not _ordered(first, second, atomics):
                races.append(Race(int(places[starts[i]]) * grain, first, second))
                if len(races) == MAX_RACES:
                    return Contested(True, races)
    return Contested(bool(by_programs.any()), races)


def _flattened(log: Sequence[Access], grain: int) -> tuple[Array, Array, Array]:
    """One number a thread and grain of every access: its place, its turn and the thread."""
    places, turns, threads = [], [], []
    for turn, access in enumerate(log):
        for i in range(access.size // grain):
            places.append(access.addresses // np.uint64(grain) + np.uint64(i))
            turns.append(np.full(len(access.addresses), turn))
            threads.append(access.threads.astype(np.int64))
    return np.concatenate(places).view(np.int64), np.concatenate(turns), np.concatenate(threads)


def _pairs(uses: Sequence[Use]) -> Iterator[tuple[Use, Use]]:
    """Each use, with the last store before it; a store also with all loads since that one."""
    store: Use | None = None
    loads: list[Use] = []
    for use in uses:
        before = [store] if store else []
        if use.access.kind != "load":
            before += loads
            store, loads = use, []
        else:
            loads.append(use)
        for other in before:
            if other[1:3] != use[1:3] and not other.access.kind == use.access.kind == "atomic":
                yield other, use


class _Atomics:
    """Who drew from which address, in turn."""

    def __init__(self, log: Sequence[Access]) -> None:
        self.drawn: dict[int, list[Use]] = defaultdict(list)
        for turn, access in enumerate(log):
            if access.kind == "atomic":
                for address, thread in zip(access.addresses, access.threads, strict=True):
                    use = Use(turn, access.program, int(thread), access)
                    self.drawn[int(address)].append(use)


def _ordered(first: Use, second: Use, atomics: _Atomics) -> bool:
    if first.program == second.program:
        return first.access.phase < second.access.phase
    return any(
        any(
            release.turn < acquire.turn <= second.turn
            and acquire.program == second.program
            and (acquire.thread == second.thread or acquire.access.phase < second.access.phase)
            for acquire in draws
        )
        for draws in atomics.drawn.values()
        for release in draws
        if release.program == first.program
        and release.turn >= first.turn
        and (release.thread == first.thread or release.access.phase > first.access.phase)
    )
