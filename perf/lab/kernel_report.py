"""What an audit finds out about a kernel or a step: its columns, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lab.gpus import GPUS

ALIGNMENT = 16  # bytes: that of a vector
VECTOR_BITS = 128  # 4 elements of float32, 8 of 16 bits
BYTES_OVER_FLOOR = 1.01
FEW = 2  # elements of a row that are loaded together: with no more, a spill is listed and allowed
# What a step by rows may load and store beside rows.
ID_BYTES = 28  # an id: itself 8; its key of int32 stored once and loaded twice; its place 8
PROGRAM_BYTES = 288  # a program: tables, and the keys around its chunk
PARTIAL_ROWS = 4  # a program: two partial sums, each stored once and loaded once
PARTIAL_SIZE = 4  # bytes of their elements: float32


class DenseReport(NamedTuple):
    """One kernel that updates whole tensors, on one architecture."""

    architecture: str
    kernel: str
    alignment: int  # bytes, of every address
    registers: int  # a thread
    spills: int  # bytes a thread
    shared: int  # bytes a program
    load_bits: int  # the widest load of the main path; 0 where there is no main path
    store_bits: int
    narrowest_bits: int  # of both
    instructions: float  # of the main path, an element
    with_detours: float
    resident_warps: int  # an SM
    in_flight: int  # bytes an SM
    bytes_per_param: float
    floor: int
    launches: int  # a step

    @property
    def memory_rate(self) -> float:
        return GPUS[self.architecture].memory_rate(self.floor)

    @property
    def issue_rate(self) -> float:
        return GPUS[self.architecture].issue_rate(self.instructions)

    @property
    def limit(self) -> str:
        return "memory" if self.memory_rate <= self.issue_rate else "issue"

    def findings(self) -> list[str]:
        """What is wrong with it, a sentence each."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes a thread; 0 are allowed")
        if not self.narrowest_bits:
            found.append("stores no whole block without a mask")
        elif self.alignment == ALIGNMENT and self.narrowest_bits < VECTOR_BITS:
            found.append(
                f"has a load or store of {self.narrowest_bits} bits on its main path; "
                f"{VECTOR_BITS} are asked for"
            )
        if not self.floor <= self.bytes_per_param <= BYTES_OVER_FLOOR * self.floor:
            found.append(
                f"moves {self.bytes_per_param:.3f} bytes a parameter; {self.floor} to "
                f"{BYTES_OVER_FLOOR * self.floor:.3f} are allowed"
            )
        if self.launches != 1:
            found.append(f"takes {self.launches} update launches a step; 1 is allowed")
        if self.architecture == "sm_90" and self.narrowest_bits and self.limit == "issue":
            allowed = GPUS[self.architecture].issue / self.memory_rate
            found.append(
                f"issues {self.instructions:.1f} instructions an element; {allowed:.1f} fit while "
                "memory moves it"
            )
        return _sentences(f"{self.architecture} {self.kernel}", found)


class RowReport(NamedTuple):
    """One kernel that updates by rows, on one architecture."""

    architecture: str
    kernel: str
    block_rows: int
    warps: int  # of a program
    multiple: int  # elements that are loaded together
    registers: int  # a thread
    spills: int  # bytes a thread
    shared: int  # bytes a program
    load_bits: int  # the widest load of rows
    store_bits: int
    accesses: int  # instructions that load or store rows
    split: int  # of these, narrower than they could be
    adjacent: int  # elements of a row that a thread loads, next to each other
    instructions: int
    loop: int  # of these
    resident_programs: int  # an SM
    in_flight: int  # bytes an SM

    @property
    def spills_allowed(self) -> bool:
        return self.multiple <= FEW

    def findings(self) -> list[str]:
        """What is wrong with it, a sentence each."""
        found = []
        if self.spills and not self.spills_allowed:
            found.append(f"spills {self.spills} bytes a thread; 0 are allowed")
        if self.split:
            found.append(
                f"has {self.split} of {self.accesses} loads and stores of rows that are narrower "
                f"than {self.multiple} elements or 128 bits"
            )
        if self.adjacent > self.multiple:
            found.append(
                f"has {self.adjacent} elements next to each other a thread, loaded by "
                f"{self.multiple}"
            )
        return _sentences(f"{self.architecture} {self.kernel}", found)


class StepReport(NamedTuple):
    """What one step by rows moved, in bytes; one launch makes the keys, the other reads them."""

    name: str
    ids: int
    rows: int  # touched
    width: int
    programs: int  # of the update
    floor: int  # values once, and touched rows in and out
    moved: int  # of these
    astray: int  # of these elements, those that were not moved exactly once
    keys: int  # with the ids they are made of
    order: int
    partials: int
    tables: int

    @property
    def beside(self) -> int:
        """Bytes that are neither of rows nor of sums of them."""
        return self.keys + self.order + self.tables

    @property
    def total(self) -> int:
        return self.moved + self.partials + self.beside

    def findings(self) -> list[str]:
        """What is wrong with what it moves, a sentence each."""
        found = []
        if self.astray or self.moved != self.floor:
            found.append(
                f"moves {self.moved} bytes of values and rows, {self.astray} elements not exactly "
                f"once; {self.floor} are the floor"
            )
        allowed = ID_BYTES * self.ids + PROGRAM_BYTES * self.programs
        if self.beside > allowed:
            found.append(
                f"moves {self.beside} bytes of ids, keys, order and tables; {allowed} are allowed"
            )
        allowed = PARTIAL_ROWS * PARTIAL_SIZE * self.width * self.programs
        if self.partials > allowed:
            found.append(f"moves {self.partials} bytes of partial sums; {allowed} are allowed")
        return _sentences(self.name, found)


def _sentences(name: str, found: Sequence[str]) -> list[str]:
    return [f"{name} {sentence}." for sentence in found]
