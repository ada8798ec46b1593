"""The ways through machine code, and what an instruction does to values and loads on their way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# What holds the number of a thread: NVIDIA's special register, and what AMD's kernels start with.
THREAD_ID = frozenset({"SR_TID.X", "v0"})

Graph = list[list[int]]  # by the place of an instruction


class Instruction(NamedTuple):
    """One machine instruction, of either vendor."""

    reads: frozenset[str] = frozenset()  # registers
    writes: frozenset[str] = frozenset()
    predicated: bool = False
    jumps_to: int | None = None  # the place of another instruction
    calls: int | None = None
    ends: bool = False  # the kernel, or a subroutine
    falls_through: bool = True
    access: str = ""  # "load" or "store" of global memory
    n_bytes: int = 0  # of that access, a thread
    waits: bool = False  # for asynchronous copies

    @property
    def stored(self) -> int:
        """Bytes that it stores without a mask."""
        return self.n_bytes if self.access == "store" and not self.predicated else 0

    def waits_for(self, load: Instruction) -> bool:
        """Whether it is executed only when a load before it is done."""
        touched = self.reads | self.writes
        return bool(load.writes & touched) or (self.waits and not load.writes)

    def varying_after(self, varying: frozenset[str]) -> frozenset[str]:
        """The registers that differ from thread to thread after it, of those before it."""
        if self.reads & varying:
            return varying | self.writes
        return varying if self.predicated else varying - self.writes


def successors(code: Sequence[Instruction], *, into_calls: bool = False) -> Graph:
    """Where each instruction leads; what follows the last one is never reached."""
    after: Graph = []
    for i, instruction in enumerate(code):
        targets = [instruction.jumps_to, instruction.calls if into_calls else None]
        places = [place for place in targets if place is not None]
        follows = instruction.falls_through and i + 1 < len(code)
        after.append([*places, i + 1] if follows else places)
    return after


def predecessors(after: Graph) -> Graph:
    before: Graph = [[] for _ in after]
    for i, places in enumerate(after):
        for j in places:
            before[j].append(i)
    return before


def reach(places: Iterable[int], step: Graph, without: Iterable[int] = ()) -> set[int]:
    """These places, and all that come after, or before, them."""
    closed = {*without}
    reached = {*places} - closed
    todo = [*reached]
    while todo:
        new = {*step[todo.pop()]} - reached - closed
        reached |= new
        todo += new
    return reached


def varying_reads(code: Sequence[Instruction], after: Graph) -> set[int]:
    """Instructions that read what may differ from thread to thread: followed from its number."""
    held: list[frozenset[str] | None] = [None] * len(code)  # such registers, before each
    held[0], todo = THREAD_ID, [0]
    while todo:
        i = todo.pop()
        registers = code[i].varying_after(held[i] or frozenset())
        for j in after[i]:
            known = held[j]
            if known is None or not registers <= known:
                held[j] = registers if known is None else known | registers
                todo.append(j)
    return {i for i, registers in enumerate(held) if registers and code[i].reads & registers}


def most_under_way(
    code: Sequence[Instruction], after: Graph, among: Iterable[int], varying: set[int]
) -> int:
    """The most bytes on their way to a thread at a time, of tensors: what it loads at `varying`.

    A load is under way from where it stands, on whatever way, until something touches its
    registers; where ways meet, the loads of all of them are.
    """
    under_way: dict[int, set[int]] = {i: set() for i in among}  # loads, before each
    todo = sorted(under_way, reverse=True)
    most = 0
    while todo:
        i = todo.pop()
        loads = {j for j in under_way[i] if not code[i].waits_for(code[j])}
        if code[i].access == "load" and i in varying:
            loads.add(i)
        most = max(most, sum(code[j].n_bytes for j in loads))
        for j in {*after[i]} & under_way.keys():
            if not loads <= under_way[j]:
                under_way[j] |= loads
                todo.append(j)
    return most
