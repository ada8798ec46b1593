"""Shared memory of a program, with who touched which bytes of it since the last barrier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .access import MAX_THREADS, Access, Fault
from .floats import Array
from .integers import UNSIGNED
from .parser import UnknownPTX

NOBODY = -1


class SharedMemory:
    """
    Args:
        size: bytes.
        start: its first address.
        grain: bytes that are watched together: no access is smaller.
        rng: for what it holds before anything is stored.

    Attributes:
        unset_loads: how many loads of bytes that nobody had stored, or threads differently at once.
    """

    def __init__(self, size: int, start: int, grain: int, rng: np.random.Generator) -> None:
        self._size, self._start, self._grain, self._rng = size, start, grain, rng
        n = -(-size // 16) * 16
        memory = rng.integers(0, 256, n, dtype=np.uint8)
        self._views = {bits: memory.view(kind) for bits, kind in UNSIGNED.items()}
        # By grain, phase and thread, in one number, of the last store and the last two loads.
        self._stored, self._loaded, self._loaded_too = np.full((3, n // grain), NOBODY)
        self._is_set = np.zeros(n // grain, bool)
        self.unset_loads = 0

    def load(self, access: Access, bits: int) -> list[Array]:
        first = self._first(access)
        now = access.phase * MAX_THREADS + access.threads.astype(np.int64)
        for grains in self._grains(first, access.size):
            self.unset_loads += int((~self._is_set[grains]).sum())
            self._check(self._stored, "stored", grains, now, access)
            before = self._loaded[grains]
            another = (before // MAX_THREADS == access.phase) & (before != now)
            self._loaded_too[grains[another]] = before[another]
            self._loaded[grains] = now
            another = self._loaded[grains] != now  # of several lanes, one is kept
            self._loaded_too[grains[another]] = now[another]
        return [self._views[bits][first // (bits // 8) + i] for i in range(access.size * 8 // bits)]

    def atomic(self, access: Access, *_: object) -> Array:
        raise UnknownPTX(f"an atomic in shared memory, {access}")

    def store(self, access: Access, values: Sequence[Array]) -> None:
        first, bits = self._first(access), values[0].dtype.itemsize * 8
        now = access.phase * MAX_THREADS + access.threads.astype(np.int64)
        for grains in self._grains(first, access.size):
            for who, did in ((self._stored, "stored"), (self._loaded, "loaded"),
                             (self._loaded_too, "loaded")):  # fmt: skip
                self._check(who, did, grains, now, access)
            self._stored[grains] = now
            self._is_set[grains] = True
        for i, value in enumerate(values):
            places = first // (bits // 8) + i
            self._views[bits][places] = value
            several = places[self._views[bits][places] != value]  # and not one value
            if len(several):
                self._forget(several * (bits // 8), bits // 8)

    def _forget(self, offsets: Array, size: int) -> None:
        """Hold noise there: threads stored different values at once, and any may stay."""
        for i in range(size):
            self._views[8][offsets + i] = self._rng.integers(0, 256, len(offsets), np.uint8)
        for grains in self._grains(offsets, size):
            self._is_set[grains] = False

    def _first(self, access: Access) -> Array:
        """Offsets of a checked access, in bytes."""
        first = access.addresses.astype(np.int64) - self._start
        if len(first) and (int(first.min()) < 0 or int(first.max()) + access.size > self._size):
            raise Fault(f"{access.kind} outside of {self._size} bytes of shared memory, {access}")
        access.check_alignment()
        return first

    def _grains(self, first: Array, size: int) -> Iterator[Array]:
        return (first // self._grain + i for i in range(size // self._grain))

    def _check(self, who: Array, did: str, grains: Array, now: Array, access: Access) -> None:
        """
        Raises:
            Fault: another thread did that since the last barrier.
        """
        before = who[grains]
        race = (before // MAX_THREADS == access.phase) & (before != now)
        if race.any():
            mine, other = now[race][0] % MAX_THREADS, before[race][0] % MAX_THREADS
            raise Fault(
                f"race in shared memory: thread {mine}'s {access.kind} of what thread {other} "
                f"{did}, without a barrier, {access}"
            )
