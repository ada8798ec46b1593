"""The path that a compiled kernel takes for whole blocks: its length, its loads and stores.

A kernel has two branches: one for whole blocks, without a mask, and one for the end of a tensor.
The main path is the first: of all paths from entry to an end whose unpredicated stores write
exactly the blocks of a program, the shortest. (At the end of a tensor NVIDIA predicates every
store; AMD moves addresses out of bounds, which takes more instructions.) It goes around a loop over
blocks as often as there are blocks. IEEE division and square root branch off for zeros, subnormals
and infinities. Such a detour is longer than what it replaces, so it is not on the main path;
`detours` counts them all, with the subroutine in full at each of its calls.

Counted by hand, SGD in float32 for sm_90 at a time when a program updated one block: entry 0x000 to
the branch at 0x2b0, 44 instructions; from there to EXIT at 0x470, 28: together 72, for 8 elements a
thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lab.control_flow import (
    Instruction,
    most_under_way,
    predecessors,
    reach,
    successors,
    varying_reads,
)  # fmt: skip


class MainPath(NamedTuple):
    """What a thread executes for the whole blocks of its program."""

    instructions: int
    detours: int  # instructions that its branches could add, an upper bound
    loads: tuple[int, ...]  # bytes of every access of a tensor on the path, tables left out
    stores: tuple[int, ...]
    outstanding: int  # the most bytes on their way to a thread at a time


class Code:
    """The instructions of a kernel, and the ways through them."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._code = instructions
        self._after = successors(instructions)
        self._before = predecessors(self._after)
        self._sizes = [1 + self._size_of_subroutine(code.calls) for code in instructions]

    def main_path(self, stored: int) -> MainPath | None:
        """The path of whole blocks, or None where every way to store them is under a mask.

        Args:
            stored: bytes that a thread stores for all blocks of its program.

        Raises:
            ValueError: there is a loop on the path that stores nothing, or in a subroutine: how
                often it is gone around is not known.
        """
        path = self._shortest(stored)
        if path is None:
            return None
        stores = {i for i in path if self._code[i].stored}
        for loop in self._loops(reach([0], self._after)):
            if loop & {*path} and not loop & stores:
                raise ValueError("a loop on the main path stores nothing")
        code = [self._code[i] for i in path]
        line = [[i] for i in range(1, len(code))] + [[]]
        # A tensor's address differs from thread to thread, a table's does not.
        varying = varying_reads(code, line)
        accesses = [code[i] for i in sorted(varying) if code[i].access]
        return MainPath(
            instructions=self._length(path),
            detours=self._detours(path),
            loads=tuple(a.n_bytes for a in accesses if a.access == "load"),
            stores=tuple(a.n_bytes for a in accesses if a.access == "store"),
            outstanding=most_under_way(code, line, range(len(code)), varying),
        )

    def _shortest(self, stored: int) -> list[int] | None:
        """Of the paths that store so many bytes without a mask, the shortest: Dijkstra's search."""
        start = (0, 0)  # a place, and bytes stored before it
        lengths, parents = {start: 0}, {start: start}
        queue = [(0, start)]
        while queue:
            length, here = heapq.heappop(queue)
            code, bytes_stored = self._code[here[0]], here[1] + self._code[here[0]].stored
            if code.ends and bytes_stored == stored:
                path = [here]
                while path[-1] != start:
                    path.append(parents[path[-1]])
                return [place for place, _ in reversed(path)]
            if length > lengths[here] or bytes_stored > stored:
                continue
            length += self._sizes[here[0]]
            for place in self._after[here[0]]:
                there = (place, bytes_stored)
                if length < lengths.get(there, length + 1):
                    lengths[there], parents[there] = length, here
                    heapq.heappush(queue, (length, there))
        return None

    def _size_of_subroutine(self, place: int | None) -> int:
        """Instructions of the subroutine that starts there, and of what it calls itself."""
        if place is None:
            return 0
        subroutine = reach([place], self._after)
        if self._loops(subroutine):
            raise ValueError("a loop in a subroutine")
        return sum(1 + self._size_of_subroutine(self._code[i].calls) for i in subroutine)

    def _length(self, places: Iterable[int]) -> int:
        """Instructions at these places, and of what they call."""
        return sum(self._sizes[i] for i in places)

    def _detours(self, path: Sequence[int]) -> int:
        """Instructions that branch off the path, call a subroutine, and come back to it."""
        tail = {i for i, c in enumerate(self._code) if c.access and (c.predicated or c.stored)}
        beside = reach(path, self._before, tail - {*path}) - {*path}
        length = 0
        for i in path:
            for j in {*self._after[i]} & beside:
                detour = reach([j], self._after, {*range(len(self._code))} - beside)
                if any(self._code[k].calls is not None for k in detour):
                    length += self._length(detour)
        return length

    def _loops(self, among: set[int]) -> list[set[int]]:
        """What a jump backwards repeats, if what it jumps to leads back to it."""
        loops = []
        for i in among:
            target = self._code[i].jumps_to
            if target is not None and target <= i:
                loop = reach([target], self._after) & reach([i], self._before)
                loops += [loop] if loop else []
        return loops
