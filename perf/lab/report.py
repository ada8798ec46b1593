"""What a run prints."""

from __future__ import annotations

from collections.abc import Sequence

from lab.goals import judged
from lab.rows import OK, Row


def print_group(rows: Sequence[Row]) -> None:
    """Print what one group gave."""
    first = rows[0]
    print(f"\n{first.layout}: {first.tensors} tensors, {first.params:,} parameters; ", end="")
    print(f"{first.rule}, {first.storage}")
    print(f"  {'':<16}{'GPU us':>12}{'p20-p80':>22}{'wall us':>12}{'host us':>12}", end="")
    print(f"{'GB/s':>8}{'% copy':>8}{'% mix':>8}{'% peak':>8}{'extra B':>12}{'first ms':>10}")
    for row in rows:
        print(f"  {row.implementation:<16}{_columns(row)}")


def _columns(row: Row) -> str:
    if row.status != OK:
        error = f" (error {row.error:.1e}, tolerance {row.tolerance:.1e})" if row.error else ""
        return f"{row.status}{error}{': ' if row.detail else ''}{row.detail}"
    spread = f"{row.gpu_us_p20:.1f}-{row.gpu_us_p80:.1f}"
    of = (row.percent_of_copy, row.percent_of_mixed_copy, row.percent_of_peak)
    shares = "".join(f"{'' if share is None else f'{share:.1f}':>8}" for share in of)
    extra = "" if row.step_extra_bytes is None else f"{row.step_extra_bytes}"
    first = "" if row.first_ms is None else f"{row.first_ms:.0f}"
    gaps = "  host gaps" if row.gaps and row.gaps > 0.5 else ""
    return (
        f"{row.gpu_us:>12.1f}{spread:>22}{row.wall_us:>12.1f}{row.host_us:>12.1f}"
        f"{row.gb_per_s:>8.0f}{shares}{extra:>12}{first:>10}{gaps}"
    )


def print_launches(rows: Sequence[Row]) -> None:
    """Print the launches of a step where they were counted."""
    counted = [row for row in rows if row.launches is not None]
    if counted:
        print("\nlaunches a step:")
    for row in counted:
        where = f"{row.layout:<16}{row.rule:<12}{row.storage:<18}"
        print(f"  {where}{row.implementation:<16}{row.launches:>6}")


def print_goals(rows: Sequence[Row]) -> None:
    """Print every goal that the rows can judge."""
    goals = judged(rows)
    if goals:
        print("\ngoals, each judged by the worst of these rows:")
    for goal in goals:
        print(f"  {'met' if goal.met else 'MISSED':<8}{goal.text}: {goal.reached}")
