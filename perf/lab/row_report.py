"""What `perf/audit_rows.py` finds out about kernels over rows: as rows, as sentences, as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lab.gpus import GPUS
from lab.row_traffic import Step

FEW = 2  # elements that are loaded together: with no more, a spill is listed and allowed
# What a step may load and store beside rows.
ID_BYTES = 28  # an id: itself 8; its key of int32 stored once and loaded twice; its place 8
PROGRAM_BYTES = 288  # a program: tables, and the keys around its chunk
PARTIAL_ROWS = 4  # a program: two partial sums, each stored once and loaded once
PARTIAL_SIZE = 4  # bytes of their elements: float32

KERNEL_LEGEND = """
kernel    rule, flags, sparse or dense gradients, dtypes (of parameter/gradient/state where they
          differ), columns of a block / elements that are loaded together; gated: under a GradScaler
rows      of a block; warps: of a program
regs      32-bit registers a thread
spill     bytes a thread that did not fit them
shared    bytes of shared memory a program
load      bits of the widest load of rows; store likewise
split     how many of all loads and stores of rows (gradients, parameters, state and partial sums)
          are narrower than the elements that may be loaded together, or 128 bits
adj       elements next to each other that a thread loads: with more than go together, a warp
          touches a sector again
instr     machine instructions of the kernel; loop: of those, in its loop over blocks
progs     resident programs an SM that registers and shared memory allow
KB        in flight an SM at most: progs x threads x bytes that a thread waits for at a time in that
          loop, if no row is masked"""
STEP_LEGEND = """
step      rule, flags, dtype, elements of a row; ids that are uniform, or one row a quarter of them;
          long: cut as a batch of 131,072 ids is, the others as the batch that they are
ids, rows how many ids, and rows that they touch
progs     programs of the update
floor     bytes: values loaded once, rows of parameter and state loaded once and stored once
moved     of these; astray: elements of them that were not moved exactly once
          then in percent of the floor: what else the two launches load and store; over: all of that
B/row     bytes a touched row, all in all; B/el: a touched element"""


class Row(NamedTuple):
    """One kernel on one architecture."""

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


def findings(row: Row) -> list[str]:
    """What is wrong with a kernel, a sentence each."""
    found = []
    if row.spills and row.multiple > FEW:
        found.append(f"spills {row.spills} bytes a thread; 0 are allowed")
    if row.split:
        found.append(
            f"has {row.split} of {row.accesses} loads and stores of rows that are narrower than "
            f"{row.multiple} elements or 128 bits"
        )
    if row.adjacent > row.multiple:
        found.append(
            f"has {row.adjacent} elements next to each other a thread, loaded by {row.multiple}"
        )
    return [f"{row.architecture} {row.kernel} {sentence}." for sentence in found]


def step_findings(step: Step) -> list[str]:
    """What is wrong with what a step moves, a sentence each."""
    found = []
    if step.astray or step.moved != step.floor:
        found.append(
            f"moves {step.moved} bytes of values and rows, {step.astray} elements not exactly "
            f"once; {step.floor} are the floor"
        )
    beside, allowed = step.beside, ID_BYTES * step.ids + PROGRAM_BYTES * step.programs
    if beside > allowed:
        found.append(f"moves {beside} bytes of ids, keys, order and tables; {allowed} are allowed")
    allowed = PARTIAL_ROWS * PARTIAL_SIZE * step.width * step.programs
    if step.partials > allowed:
        found.append(f"moves {step.partials} bytes of partial sums; {allowed} are allowed")
    return [f"{step.name} {sentence}." for sentence in found]


def print_kernels(rows: Sequence[Row]) -> None:
    """The rows by architecture, what their columns mean, and the spills that are allowed."""
    header = (
        f"{'kernel':<54}{'rows':>5}{'warps':>6}{'regs':>5}{'spill':>6}{'shared':>7}{'load':>5}"
        f"{'store':>6}{'split':>9}{'adj':>4}{'instr':>6}{'loop':>6}{'progs':>6}{'KB':>5}"
    )
    for architecture, group in groupby(rows, key=lambda row: row.architecture):
        print(f"\n{architecture}, {GPUS[architecture].arithmetic()}\n{header}")
        for row in group:
            print(
                f"{row.kernel:<54}{row.block_rows:>5}{row.warps:>6}{row.registers:>5}"
                f"{row.spills:>6}{row.shared:>7}{row.load_bits:>5}{row.store_bits:>6}"
                f"{f'{row.split}/{row.accesses}':>9}{row.adjacent:>4}{row.instructions:>6}{row.loop:>6}"
                f"{row.resident_programs:>6}{row.in_flight / 1000:>5.0f}"
            )
    print(KERNEL_LEGEND)
    spilling = [row for row in rows if row.spills and row.multiple <= FEW]
    print(f"\n{len(spilling)} kernels spill where no more than {FEW} elements go together: allowed")
    for row in spilling:
        print(f"- {row.architecture} {row.kernel}: {row.spills} bytes a thread")


def print_steps(steps: Iterable[Step]) -> None:
    """The steps, and what their columns mean."""
    print(
        f"\n{'step':<44}{'ids':>5}{'rows':>5}{'progs':>6}{'floor':>8}{'moved':>8}{'astray':>7}"
        f"{'keys':>6}{'order':>6}{'parts':>6}{'tables':>7}{'over':>6}{'B/row':>8}{'B/el':>6}"
    )
    for step in steps:
        beside = (step.keys, step.order, step.partials, step.tables)
        keys, order, partials, tables = (100 * n / step.floor for n in beside)
        print(
            f"{step.name:<44}{step.ids:>5}{step.rows:>5}{step.programs:>6}{step.floor:>8}"
            f"{step.moved:>8}{step.astray:>7}{keys:>6.1f}{order:>6.1f}{partials:>6.1f}"
            f"{tables:>7.1f}{step.over:>6.1f}{step.total / step.rows:>8.1f}"
            f"{step.total / step.rows / step.width:>6.2f}"
        )
    print(STEP_LEGEND)


def as_json(triton_version: str, rows: Iterable[Row], steps: Iterable[Step]) -> str:
    """The kernels by architecture, then the steps, a line each."""
    groups = [
        f"{json.dumps(architecture)}: {_lines({row.kernel: _rest(row, 2) for row in group})}"
        for architecture, group in groupby(rows, key=lambda row: row.architecture)
    ]
    kernels = "{\n" + ",\n".join(groups) + "\n}"
    content = _lines({step.name: _rest(step, 1) for step in steps})
    return f'{{"triton": "{triton_version}", "kernels": {kernels}, "steps": {content}}}\n'


def _rest(measured: Any, n_names: int) -> dict[str, int]:
    return dict([*measured._asdict().items()][n_names:])


def _lines(items: dict[str, dict[str, int]]) -> str:
    lines = (f"{json.dumps(name)}: {json.dumps(measures)}" for name, measures in items.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def from_json(text: str) -> tuple[str, list[Row], list[Step]]:
    """Triton's version, the kernels and the steps."""
    content = json.loads(text)
    kernels, steps = content["kernels"], content["steps"]
    rows = [Row(a, name, **row) for a, group in kernels.items() for name, row in group.items()]
    return content["triton"], rows, [Step(name, **step) for name, step in steps.items()]
