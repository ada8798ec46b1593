"""All that an audit finds out: printed, and as the file that is committed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lab.audit_columns import DENSE_COLUMNS, ROW_COLUMNS, STEP_COLUMNS
from lab.columns import Column, print_legend, print_table
from lab.gpus import GPUS
from lab.kernel_report import FEW, DenseReport, RowReport, StepReport

NAMES = ("architecture", "kernel", "name")  # of a report, which are no figures


class Audit(NamedTuple):
    """The kernels that update whole tensors, those that update by rows, and steps by rows."""

    triton: str
    kernels: Sequence[DenseReport] = ()
    row_kernels: Sequence[RowReport] = ()
    row_steps: Sequence[StepReport] = ()

    def findings(self) -> list[str]:
        """What is wrong, a sentence each."""
        reports: list[Any] = [*self.kernels, *self.row_kernels, *self.row_steps]
        return [finding for report in reports for finding in report.findings()]

    def print(self) -> None:
        """Tables, what their columns mean, and the spills that are allowed."""
        _print_kernels(DENSE_COLUMNS, self.kernels)
        _print_kernels(ROW_COLUMNS, self.row_kernels)
        if spilling := [r for r in self.row_kernels if r.spills and r.spills_allowed]:
            print(f"\n{len(spilling)} kernels spill where no more than {FEW} elements go together:")
            print("".join(f"- {r.architecture} {r.kernel}: {r.spills} bytes\n" for r in spilling))
        if self.row_steps:
            print_table(STEP_COLUMNS, self.row_steps)
            print_legend(STEP_COLUMNS)

    def as_json(self) -> str:
        """A line a kernel or step."""
        parts = [f'"triton": "{self.triton}"']
        for name in ("kernels", "row_kernels"):
            groups = groupby(getattr(self, name), key=lambda report: report.architecture)
            lines = {a: _lines({r.kernel: _measures(r) for r in of}) for a, of in groups}
            parts.append(f'"{name}": {_lines(lines)}')
        steps = {step.name: _measures(step) for step in self.row_steps}
        return "{" + ", ".join([*parts, f'"row_steps": {_lines(steps)}']) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Audit:
        content = json.loads(text)
        kernels: list[Any] = []
        rows: list[Any] = []
        for found, kind, section in (
            (kernels, DenseReport, "kernels"),
            (rows, RowReport, "row_kernels"),
        ):
            for architecture, named in content[section].items():
                for name, row in named.items():
                    row.pop("limit", None)
                    found.append(kind(architecture, name, **row))
        steps = [StepReport(name, **row) for name, row in content["row_steps"].items()]
        return cls(content["triton"], kernels, rows, steps)


def _print_kernels(columns: Sequence[Column], reports: Sequence[Any]) -> None:
    for architecture, group in groupby(reports, key=lambda report: report.architecture):
        print(f"\n{architecture}, {GPUS[architecture].arithmetic()}")
        print_table(columns, group)
    if reports:
        print_legend(columns)


def _measures(report: Any) -> str:
    measures = report._asdict()
    if isinstance(report, DenseReport):
        measures["limit"] = report.limit
    return json.dumps({name: value for name, value in measures.items() if name not in NAMES})


def _lines(items: dict[str, str]) -> str:
    """JSON with a line an item."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {items[name]}" for name in items) + "\n}"
