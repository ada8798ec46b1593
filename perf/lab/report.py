"""What a run prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lab.columns import Column
from lab.goals import judged
from lab.rows import COPIES, NO_ROOM, OK, Row


def _spread(clock: str) -> Callable[[Row], str | None]:
    def cell(row: Row) -> str | None:
        low, high = (getattr(row, f"{clock}_{end}") for end in ("p20", "p80"))
        return None if low is None else f"{low:.1f}-{high:.1f}"

    return cell


COLUMNS = (
    Column("GPU us", ">12.1f", "gpu_us"),
    Column("p20-p80", ">22", _spread("gpu_us")),
    Column("wall us", ">12.1f", "wall_us"),
    Column("p20-p80", ">22", _spread("wall_us")),
    Column("host us", ">12.1f", "host_us"),
    Column("GB/s", ">8.0f", "gb_per_s"),
    Column("% copy", ">8.1f", "percent_of_copy"),
    Column("% mix", ">8.1f", "percent_of_mixed_copy"),
    Column("% peak", ">8.1f", "percent_of_peak"),
    Column("extra B", ">12d", "step_extra_bytes"),
    Column("first ms", ">10.0f", "first_ms"),
)


def print_group(rows: Sequence[Row]) -> None:
    """Print what one group gave."""
    first = rows[0]
    touched = f"; {first.unique_rows:,} rows touched" if first.unique_rows else ""
    print(
        f"\n{first.layout}: {first.tensors} tensors, {first.params:,} parameters{touched}; ", end=""
    )
    print(f"{first.rule}, {first.storage}")
    print(f"  {'':<16}" + "".join(column.title for column in COLUMNS))
    for row in rows:
        print(f"  {row.implementation:<16}{_cells(row)}".rstrip())


def _cells(row: Row) -> str:
    if row.status != OK:
        error = f" (error {row.error:.1e}, tolerance {row.tolerance:.1e})" if row.error else ""
        return f"{row.status}{error}{': ' if row.detail else ''}{row.detail}"
    gaps = "  host gaps" if row.gaps and row.gaps > 0.5 else ""
    return "".join(column.cell(row) for column in COLUMNS) + gaps


def print_launches(rows: Sequence[Row]) -> None:
    """Print the launches of a step where they were counted."""
    counted = [row for row in rows if row.launches is not None]
    if counted:
        print("\nlaunches a step:")
    for row in counted:
        where = f"{row.layout:<16} {row.rule:<12}{row.storage:<18}"
        print(f"  {where}{row.implementation:<16}{row.launches:>6}")


def print_missing(rows: Sequence[Row]) -> None:
    """Print what did not fit the memory."""
    missing = [row for row in rows if row.status == NO_ROOM and row.implementation not in COPIES]
    if missing:
        print("\ndid not fit the memory:")
    for row in missing:
        print(f"  {row.layout}: {row.rule}, {row.storage}, {row.implementation}")


def print_goals(rows: Sequence[Row]) -> None:
    """Print every goal that the rows can judge."""
    goals = [*judged(rows)]
    if goals:
        print("\ngoals, each judged by the worst of these rows:")
    for goal in goals:
        print(f"  {'met' if goal.met else 'MISSED':<8}{goal.text}: {goal.reached}")
