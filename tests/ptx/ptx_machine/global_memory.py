"""The host's memory as a GPU's global memory: accesses are checked, logged, and can be undone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from .access import Access, Fault
from .floats import Array
from .integers import UNSIGNED

Span = tuple[int, int]  # addresses: the first byte, and the first after
BASE = 4096
END = 2**47  # of a process's addresses


class _AllMemory:
    """All of this process's memory, from BASE on, as numpy takes it."""

    def __init__(self, bits: int) -> None:
        size = (END - BASE) // (bits // 8)
        self.__array_interface__ = {
            "data": (BASE, False), "shape": (size,), "typestr": f"<u{bits // 8}", "version": 3,
        }  # fmt: skip


MEMORY: dict[int, Array] = {bits: np.asarray(_AllMemory(bits)) for bits in UNSIGNED}


class Spans:
    """Bytes that may be accessed."""

    def __init__(self, spans: Iterable[Span]) -> None:
        merged: list[list[int]] = []
        for start, stop in sorted(spans):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(stop, merged[-1][1])
            elif start < stop:
                merged.append([start, stop])
        self.starts = np.array([start for start, _ in merged], np.uint64)
        self.stops = np.array([stop for _, stop in merged], np.uint64)
        self._starts = [start for start, _ in merged]

    def without(self, holes: Iterable[Span]) -> Spans:
        """The same bytes but for these."""
        borders = [(start, 1) for start in self._starts] + [(int(stop), -1) for stop in self.stops]
        for start, stop in holes:
            borders += [(start, -1), (stop, 1)]
        spans, depth, opened = [], 0, 0
        for at, change in sorted(borders):
            if depth == 1:
                spans.append((opened, at))
            depth, opened = depth + change, at
        return Spans(spans)

    def outside(self, addresses: Array, size: int) -> int | None:
        """The first of these addresses from which `size` bytes are not all within one span."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        i = bisect_right(self._starts, low) - 1
        if i >= 0 and high <= self.stops[i]:
            return None
        at = np.searchsorted(self.starts, addresses, "right").astype(np.int64) - 1
        within = (at >= 0) & (addresses + np.uint64(size) <= self.stops[np.maximum(at, 0)])
        return None if within.all() else int(addresses[~within][0])

    def around(self, address: int) -> str:
        """Where the nearest span is, in words."""
        if not len(self.starts):
            return "there is none"
        spans = zip(self.starts.tolist(), self.stops.tolist(), strict=True)
        start, stop = min(spans, key=lambda span: min(abs(place - address) for place in span))
        return (
            f"{address - start} bytes from the start and {address - stop} from the end of the "
            f"nearest, of {stop - start} bytes"
        )


class GlobalMemory:
    """Global memory during one run of a launch.

    Args:
        readable: what may be loaded.
        writable: what may be stored to.
        watch: called with every access before it happens.
        spoiled: by program and PTX line, threads whose loads there give something else.

    Attributes:
        log: all accesses, in order.
    """

    def __init__(
        self,
        readable: Spans,
        writable: Spans,
        watch: Callable[[Access], None] | None = None,
        spoiled: Mapping[tuple[int, int], Sequence[int]] | None = None,
    ) -> None:
        self._spans = {"load": readable, "store": writable, "atomic": writable}
        self._watch, self._spoiled = watch, spoiled or {}
        self.log: list[Access] = []
        self._undo: list[tuple[int, Array, Array]] = []  # bits, places, what was there

    def load(self, access: Access, bits: int) -> list[Array]:
        """The numbers of each thread: a vector's first ones, its second ones..."""
        places = self._places(access, bits)
        values = [MEMORY[bits][place] for place in places]
        threads = self._spoiled.get((access.program, access.instruction.line))
        if threads is not None:
            spoiled = np.isin(access.threads, threads)
            values = [np.where(spoiled, ~value, value) for value in values]
        return values

    def store(self, access: Access, values: Sequence[Array]) -> None:
        bits = values[0].dtype.itemsize * 8
        for place, value in zip(self._places(access, bits), values, strict=True):
            self._remember(bits, place)
            MEMORY[bits][place] = value
            if (MEMORY[bits][place] != value).any():
                raise Fault(f"threads store different values in one place at once, {access}")

    def atomic(self, access: Access, values: Array, operation: Callable[[int, int], int]) -> Array:
        """One thread after the other. Returns what each found."""
        bits = access.size * 8
        (places,) = self._places(access, bits)
        self._remember(bits, places)
        found = np.zeros_like(values)
        for i, place in enumerate(places):
            found[i] = MEMORY[bits][place]
            MEMORY[bits][place] = operation(int(found[i]), int(values[i])) % 2**bits
        return found

    def _places(self, access: Access, bits: int) -> list[Array]:
        """The indices in MEMORY of a checked access."""
        if len(access.addresses):
            access.check_alignment()
            outside = self._spans[access.kind].outside(access.addresses, access.size)
            if outside is not None:
                around = self._spans[access.kind].around(outside)
                raise Fault(
                    f"{access.kind} of {access.size} bytes at {outside:#x} outside of every tensor "
                    f"({around}), {access}"
                )
            self.log.append(access)
            if self._watch is not None:
                self._watch(access)
        first = ((access.addresses - np.uint64(BASE)) // np.uint64(bits // 8)).view(np.int64)
        return [first + i for i in range(access.size * 8 // bits)]

    def _remember(self, bits: int, places: Array) -> None:
        self._undo.append((bits, places, MEMORY[bits][places]))

    def written(self) -> dict[int, tuple[Array, Array]]:
        """By the width of stores in bits: the places, and what is there now."""
        found = {}
        for bits in {bits for bits, _, _ in self._undo}:
            places = np.unique(np.concatenate([p for b, p, _ in self._undo if b == bits]))
            found[bits] = (places, MEMORY[bits][places])
        return found

    def roll_back(self) -> None:
        for bits, places, old in reversed(self._undo):
            MEMORY[bits][places] = old
        self._undo.clear()


Written = Mapping[int, tuple[Array, Array]]


def put(written: Written) -> None:
    """Store once more what a run had written before it was rolled back."""
    for bits, (places, values) in written.items():
        MEMORY[bits][places] = values


def same(a: Written, b: Written) -> bool:
    """Whether two runs wrote the same bits in the same places."""
    return a.keys() == b.keys() and all(
        np.array_equal(x, y) for bits in a for x, y in zip(a[bits], b[bits], strict=True)
    )
