"""All that an audit finds out: held to limits, printed, and as the file that is committed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple

from lab.audit_columns import DENSE_COLUMNS, ROW_COLUMNS, STEP_COLUMNS
from lab.gpus import GPUS
from lab.tables import Column, print_legend, print_table

ALIGNMENT = 16  # bytes: that of a vector
VECTOR_BITS = 128  # 4 elements of float32, 8 of 16 bits
BYTES_OVER_FLOOR = 1.01
FEW = 2  # elements of a row that are loaded together: with no more, a spill is listed and allowed
# What a step by rows may load and store beside rows.
ID_BYTES = 28  # an id: itself 8; its key of int32 stored once and loaded twice; its place 8
PROGRAM_BYTES = 288  # a program: tables, and the keys around its chunk
PARTIAL_ROWS = 4  # a program: two partial sums, each stored once and loaded once
PARTIAL_SIZE = 4  # bytes of their elements: float32

Measures = dict[str, Any]  # of a kernel or a step; lab/audit_columns.py has their meanings
Limit = tuple[Callable[[Any], object], str]  # whether a report breaks it, and what is said then


def dense_report(architecture: str, name: str, measures: Measures) -> SimpleNamespace:
    """Of a kernel that updates whole tensors: its measures, and what follows from them."""
    gpu, instructions = GPUS[architecture], measures["instructions"]
    memory = gpu.bandwidth / measures["floor"]
    issue = gpu.issue / instructions if instructions else 0.0
    more = {
        "name": f"{architecture} {name}", "kernel": name, "architecture": architecture,
        "memory_rate": memory, "issue_rate": issue, "fitting": gpu.issue / memory,
        "limit": "memory" if memory <= issue else "issue",
        "most_bytes": BYTES_OVER_FLOOR * measures["floor"],
    }  # fmt: skip
    return SimpleNamespace(**{**measures, **more})


def row_report(architecture: str, name: str, measures: Measures) -> SimpleNamespace:
    """Of a kernel that updates by rows."""
    return SimpleNamespace(
        **measures, name=f"{architecture} {name}", kernel=name, architecture=architecture,
        spills_allowed=measures["multiple"] <= FEW,
    )  # fmt: skip


def step_report(name: str, measures: Measures) -> SimpleNamespace:
    """Of a step by rows: one launch makes the keys, the other reads them."""
    step = SimpleNamespace(**measures, name=name)
    step.beside = step.keys + step.order + step.tables  # neither of rows nor of sums of them
    step.total = step.moved + step.partials + step.beside
    step.beside_allowed = ID_BYTES * step.ids + PROGRAM_BYTES * step.programs
    step.partials_allowed = PARTIAL_ROWS * PARTIAL_SIZE * step.width * step.programs
    return step


SPILLS = "spills {0.spills} bytes a thread; 0 are allowed"
DENSE_LIMITS: Sequence[Limit] = (
    (lambda r: r.spills, SPILLS),
    (lambda r: not r.narrowest_bits, "stores no whole block without a mask"),
    (lambda r: r.alignment == ALIGNMENT and 0 < r.narrowest_bits < r.vector_bits,
     "has a load or store of {0.narrowest_bits} bits on its main path; {0.vector_bits} are asked "
     "for"),
    (lambda r: not r.floor <= r.bytes_per_param <= r.most_bytes,
     "moves {0.bytes_per_param:.3f} bytes a parameter; {0.floor} to {0.most_bytes:.3f} are "
     "allowed"),
    (lambda r: r.launches != 1, "takes {0.launches} update launches a step; 1 is allowed"),
    (lambda r: r.architecture == "sm_90" and r.narrowest_bits and r.limit == "issue"
     and not r.issue_allowed,
     "issues {0.instructions:.1f} instructions an element; {0.fitting:.1f} fit while memory moves "
     "it"),
)  # fmt: skip
ROW_LIMITS: Sequence[Limit] = (
    (lambda r: r.spills and not r.spills_allowed, SPILLS),
    (lambda r: r.split,
     "has {0.split} of {0.accesses} loads and stores of rows that are narrower than {0.multiple} "
     "elements or 128 bits"),
    (lambda r: r.adjacent > r.multiple,
     "has {0.adjacent} elements next to each other a thread, loaded by {0.multiple}"),
)  # fmt: skip
STEP_LIMITS: Sequence[Limit] = (
    (lambda r: r.astray or r.moved != r.floor,
     "moves {0.moved} bytes of values and rows, {0.astray} elements not exactly once; {0.floor} "
     "are the floor"),
    (lambda r: r.beside > r.beside_allowed,
     "moves {0.beside} bytes of ids, keys, order and tables; {0.beside_allowed} are allowed"),
    (lambda r: r.partials > r.partials_allowed,
     "moves {0.partials} bytes of partial sums; {0.partials_allowed} are allowed"),
)  # fmt: skip


def findings(report: SimpleNamespace, limits: Sequence[Limit]) -> list[str]:
    """What is wrong, a sentence each."""
    return [f"{report.name} {text.format(report)}." for broken, text in limits if broken(report)]


class Audit(NamedTuple):
    """What was measured, as it is in the file.

    Attributes:
        triton: version.
        kernels: that update whole tensors, by architecture and name.
        row_kernels: that update by rows.
        row_steps: by name.
    """

    triton: str
    kernels: Mapping[str, Mapping[str, Measures]]
    row_kernels: Mapping[str, Mapping[str, Measures]]
    row_steps: Mapping[str, Measures]

    def dense(self) -> Iterator[SimpleNamespace]:
        for architecture, named in self.kernels.items():
            yield from (dense_report(architecture, *item) for item in named.items())

    def by_rows(self) -> Iterator[SimpleNamespace]:
        for architecture, named in self.row_kernels.items():
            yield from (row_report(architecture, *item) for item in named.items())

    def steps(self) -> Iterator[SimpleNamespace]:
        return (step_report(*item) for item in self.row_steps.items())

    def findings(self) -> list[str]:
        """What is wrong, a sentence each."""
        held = [(self.dense(), DENSE_LIMITS), (self.by_rows(), ROW_LIMITS),
                (self.steps(), STEP_LIMITS)]  # fmt: skip
        return [found for of, limits in held for report in of for found in findings(report, limits)]

    def print(self) -> None:
        """Tables, what their columns mean, and the spills that are allowed."""
        _print_kernels(DENSE_COLUMNS, self.dense())
        _print_kernels(ROW_COLUMNS, self.by_rows())
        if spilling := [r for r in self.by_rows() if r.spills and r.spills_allowed]:
            print(f"\n{len(spilling)} kernels spill where no more than {FEW} elements go together:")
            print("".join(f"- {report.name}: {report.spills} bytes\n" for report in spilling))
        if self.row_steps:
            print_table(STEP_COLUMNS, self.steps())
            print_legend(STEP_COLUMNS)

    def as_json(self) -> str:
        """A line a kernel or step."""
        kinds = {
            kind: _lines({a: _lines(_dumped(named)) for a, named in getattr(self, kind).items()})
            for kind in ("kernels", "row_kernels")
        }
        parts = {"triton": json.dumps(self.triton), **kinds, "row_steps": _lines(_dumped(self[3]))}
        return "{" + ", ".join(f'"{name}": {part}' for name, part in parts.items()) + "}\n"


def _print_kernels(columns: Sequence[Column], reports: Iterable[SimpleNamespace]) -> None:
    printed = False
    for architecture, group in groupby(reports, key=lambda report: report.architecture):
        print(f"\n{architecture}, {GPUS[architecture].arithmetic()}")
        print_table(columns, group)
        printed = True
    if printed:
        print_legend(columns)


def _dumped(named: Mapping[str, Measures]) -> dict[str, str]:
    return {name: json.dumps(measures) for name, measures in named.items()}


def _lines(items: Mapping[str, str]) -> str:
    """JSON with a line an item."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {items[name]}" for name in items) + "\n}"
