"""What bench_sparse.py finds out: rows, their CSV file, what is printed, and the goals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lab.goals import Goal
from lab.implementations import COPY, OURS
from lab.rows import OK, write
from lab.sparse_implementations import ADAGRAD, ROWWISE, TORCH_SPARSE

RIGHT = "right"  # and not to be timed

SPEEDUP = 10.0  # over torch's sparse Adagrad
SHARE_OF_COPY = 80.0  # percent
MANY_ROWS = 100_000  # unique ones, from which on that share is a goal


@dataclass
class Row:
    """What one implementation did on one shape of tables; see README.md for each column."""

    date: str = ""
    machine: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    rule: str = ""
    tables: int = 0
    rows: int = 0
    dim: int = 0
    batch: int = 0
    distribution: str = ""
    unique_rows: int | None = None
    implementation: str = ""
    version: str = ""
    status: str = ""
    detail: str = ""
    error: float | None = None
    tolerance: float | None = None
    repeats: int | None = None
    gpu_us: float | None = None
    gpu_us_p20: float | None = None
    gpu_us_p80: float | None = None
    wall_us: float | None = None
    wall_us_p20: float | None = None
    wall_us_p80: float | None = None
    host_us: float | None = None
    host_us_p20: float | None = None
    host_us_p80: float | None = None
    gaps: float | None = None
    step_bytes: int | None = None
    l2: str = ""
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    percent_of_copy: float | None = None

    @property
    def shape(self) -> tuple[int | str, ...]:
        """What the rows that were measured together have in common."""
        return self.tables, self.rows, self.dim, self.batch, self.distribution


COLUMNS = [field.name for field in fields(Row)]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file; they are on the disk when this returns.

    Raises:
        ValueError: the file has other columns.
    """
    new = not path.exists()
    if not new and path.read_text().partition("\n")[0] != ",".join(COLUMNS):
        raise ValueError(f"{path} has other columns than perf/lab/sparse_rows.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        write(file, COLUMNS, rows, header=new)


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print what was measured together; GPU columns only where there was one."""
    on_gpu = any(row.gpu_us for row in rows)
    clocks = ("gpu_us", "wall_us", "host_us") if on_gpu else ("wall_us", "host_us")
    used = [clock for clock in clocks if any(getattr(row, clock) for row in rows)]
    print(f"\n{title}")
    heads = "".join(f"{clock.replace('_us', ' us') + ' (p20-p80)':>28}" for clock in used)
    print(f"  {'':<32}{heads}{'GB/s  % copy' if on_gpu else '':>16}".rstrip())
    for row in rows:
        name = f"{row.rule}, {row.implementation}" if row.rule else row.implementation
        print(f"  {name:<32}{_columns(row, used)}".rstrip())


def _columns(row: Row, clocks: Sequence[str]) -> str:
    if row.status != OK:
        error = f" (error {row.error:.1e}, tolerance {row.tolerance:.1e})" if row.error else ""
        return f"    {row.status}{error}{': ' if row.detail else ''}{row.detail}"
    cells = ""
    for clock in clocks:
        median, low, high = (getattr(row, f"{clock}{end}") for end in ("", "_p20", "_p80"))
        cell = "" if median is None else f"{median:.1f} ({low:.1f}-{high:.1f})"
        cells += f"{cell:>28}"
    bandwidth = "" if row.gb_per_s is None else f"{row.gb_per_s:.0f}"
    share = "" if row.percent_of_copy is None else f"{row.percent_of_copy:.1f}"
    return f"{cells}{bandwidth:>8}{share:>8}"


def judged(rows: Iterable[Row]) -> list[Goal]:
    """The goals about which rows from a GPU say something, each by the worst row."""
    timed = [row for row in rows if row.status == OK and row.gpu_us]
    return [*_speedups(timed), *_bandwidth(timed)]


def _speedups(rows: Sequence[Row]) -> Iterator[Goal]:
    torches = {
        row.shape: row
        for row in rows
        if (row.rule, row.implementation) == (ADAGRAD.name, TORCH_SPARSE)
    }
    for rule in (ADAGRAD, ROWWISE):
        ours = [
            row
            for row in rows
            if (row.rule, row.implementation) == (rule.name, OURS) and row.shape in torches
        ]
        for label, clock in (("GPU", "gpu_us"), ("wall", "wall_us")):
            ratios = [(getattr(torches[row.shape], clock) / getattr(row, clock), row)
                      for row in ours]  # fmt: skip
            if ratios:
                ratio, row = min(ratios, key=lambda pair: pair[0])
                yield Goal(
                    f"{rule.name} at least {SPEEDUP:g}x torch's sparse Adagrad, {label} time",
                    f"{ratio:.2f}x ({_where(row)})",
                    round(ratio, 2) >= SPEEDUP,
                )


def _bandwidth(rows: Sequence[Row]) -> Iterator[Goal]:
    shares = [
        (row.percent_of_copy, row)
        for row in rows
        if row.percent_of_copy
        and row.implementation != COPY
        and (row.unique_rows or 0) >= MANY_ROWS
    ]
    if shares:
        share, row = min(shares, key=lambda pair: pair[0])
        yield Goal(
            f"at least {SHARE_OF_COPY:g} % of copy bandwidth on touched bytes, from "
            f"{MANY_ROWS:,} unique rows up",
            f"{share:.1f} % ({row.rule}, {_where(row)})",
            round(share, 1) >= SHARE_OF_COPY,
        )


def _where(row: Row) -> str:
    tables = f"{row.tables} x " if row.tables > 1 else ""
    return f"{tables}{row.rows:,} x {row.dim}, {row.batch:,} ids {row.distribution}"


def print_goals(rows: Iterable[Row]) -> None:
    """Print every goal that the rows can judge."""
    goals = judged(rows)
    if goals:
        print("\ngoals, each judged by the worst of these rows:")
    for goal in goals:
        print(f"  {'met' if goal.met else 'MISSED':<8}{goal.text}: {goal.reached}")
