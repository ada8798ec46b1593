"""The code of a kernel over rows: how wide it loads and stores rows, and how much is under way.

Beside rows, such a kernel loads keys, an order, tables and the state that has one number a row.
Triton's own intermediate code says which of its loads and stores are of rows, a tensor of rows and
columns each, and which line of the source they come from; the compilers keep the lines. For NVIDIA
they are read in PTX, whose vectors the assembler takes over as they are.
"""

from __future__ import annotations

import re
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

_LOCATION = re.compile(r'^(#loc\d*) = loc\((?:"([^"]+)":(\d+):(\d+)|.*?(#loc\d*))', re.MULTILINE)
_ACCESS = re.compile(
    r"(?:tt|amdg)\.(?:buffer_)?(load|store)\b.*tensor<([\dx]+)x(?:!tt\.ptr<)?[a-z]+(\d+).*"
    r"loc\((#loc\d*)\)"
)
_LAYOUT = re.compile(r"^#(\w+) = #ttg\.blocked<\{sizePerThread = \[\d+, (\d+)\]", re.MULTILINE)
_LINE = re.compile(r"^\t\.loc\t.*(?://|;) ([\w.]+):(\d+):(\d+)")
_PTX = re.compile(r"\b(?P<way>ld|st)\.global\S*?(?:\.v(?P<n>\d))?\.[bfsu](?P<bits>\d+) ")
_AMDGCN = re.compile(
    r"\t(?:buffer|flat|global)_(load|store)_[su]?(byte|short|dword)(?:x(\d))?(?:_d16(?:_hi)?)?\s"
)
_AMDGCN_BITS = {"byte": 8, "short": 16, "dword": 32}

Place = tuple[str, int, int]  # of the source: file, line and column


class RowAccess(NamedTuple):
    """The loads or stores of rows at one place of the source."""

    stores: bool
    element_bits: int
    bits: tuple[int, ...]  # of each instruction, a thread


def row_accesses(ttgir: str, text: str, shape: str) -> list[RowAccess]:
    """What a kernel loads and stores of rows.

    Args:
        ttgir: Triton's intermediate code.
        text: the same in PTX or AMD's assembly.
        shape: of the tensors that are rows, such as "16x64".

    Raises:
        ValueError: the instructions of a place are not there.
    """
    places = _places(ttgir)
    of_rows = {
        (found[1], places[found[4]]): int(found[3])
        for found in _ACCESS.finditer(ttgir)
        if found[2] == shape
    }
    bits: dict[tuple[str, Place], list[int]] = {key: [] for key in of_rows}
    for way, place, width in instructions(text):
        if (way, place) in bits:
            bits[way, place].append(width)
    if missing := [key for key, widths in bits.items() if not widths]:
        raise ValueError(f"no instruction for {missing}")
    return [RowAccess(way == "store", of_rows[way, at], (*bits[way, at],)) for way, at in bits]


def adjacent(ttgir: str, shape: str) -> int:
    """How many elements next to each other of a row a thread loads or stores, at most."""
    elements = {name: int(n) for name, n in _LAYOUT.findall(ttgir)}
    of_rows = rf"(?:load|store)\b.*tensor<{shape}x(?:!tt\.ptr<)?\w+>?, #(\w+)>"
    return max(elements[name] for name in re.findall(of_rows, ttgir))


def _places(ttgir: str) -> dict[str, Place]:
    """Where its locations are: of a call, in the function that is called."""
    found = {name: rest for name, *rest in _LOCATION.findall(ttgir)}

    def place(name: str) -> Place:
        file, line, column, other = found.get(name, ("", 0, 0, ""))
        if file:
            return file.rpartition("/")[2], int(line), int(column)
        return place(other) if other else ("", 0, 0)

    return {name: place(name) for name in found}


def instructions(text: str) -> Iterable[tuple[str, Place, int]]:
    """Every load and store of global memory, from where in the source, and its bits."""
    place: Place = ("", 0, 0)
    for line in text.splitlines():
        if found := _LINE.match(line):
            place = (found[1], int(found[2]), int(found[3]))
        elif found := _PTX.search(line):
            way = "load" if found["way"] == "ld" else "store"
            yield way, place, int(found["bits"]) * int(found["n"] or 1)
        elif found := _AMDGCN.match(line):
            yield found[1], place, _AMDGCN_BITS[found[2]] * int(found[3] or 1)


class Loop(NamedTuple):
    """The loop over a program's blocks."""

    instructions: int
    outstanding: int  # the most bytes on their way to a thread at a time


def main_loop(code: Sequence[Instruction]) -> Loop:
    """Of the loops that store what differs from thread to thread, the first one.

    Of masked loads, all bytes count. Other than in lab/machine_code.py no path is followed: the
    loop has none that is the main one. Of several versions of the loop, as of weight decay or none,
    it is the one with the least under way.

    Raises:
        ValueError: there is no such loop.
    """
    after = successors(code, into_calls=True)  # one may be for good: sm_80's loops are left so
    before = predecessors(after)
    varying = varying_reads(code, after)
    loops: dict[int, set[int]] = {}  # by a place in them
    for i in (i for i in sorted(varying) if code[i].access == "store"):
        if not any(i in loop for loop in loops.values()):
            loop = reach(after[i], after) & reach(before[i], before)
            loops |= {i: loop} if i in loop else {}
    first = [
        loop
        for i, loop in loops.items()
        if not any(j != i and i in reach([j], after) for j in loops)
    ]
    if not first:
        raise ValueError("no loop over blocks")
    versions = [Loop(len(loop), most_under_way(code, after, loop, varying)) for loop in first]
    return min(versions, key=lambda version: version.outstanding)
