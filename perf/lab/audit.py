"""All that an audit finds out: printed, and as the file that is committed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import NamedTuple

from lab.audit_columns import DENSE_COLUMNS, ROW_COLUMNS, STEP_COLUMNS
from lab.columns import Column, print_legend, print_table
from lab.gpus import GPUS
from lab.kernel_report import (
    DENSE_LIMITS,
    FEW,
    ROW_LIMITS,
    STEP_LIMITS,
    Measures,
    dense_report,
    findings,
    row_report,
    step_report,
)  # fmt: skip


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
    any_printed = False
    for architecture, group in groupby(reports, key=lambda report: report.architecture):
        print(f"\n{architecture}, {GPUS[architecture].arithmetic()}")
        print_table(columns, group)
        any_printed = True
    if any_printed:
        print_legend(columns)


def _dumped(named: Mapping[str, Measures]) -> dict[str, str]:
    return {name: json.dumps(measures) for name, measures in named.items()}


def _lines(items: Mapping[str, str]) -> str:
    """JSON with a line an item."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {items[name]}" for name in items) + "\n}"
