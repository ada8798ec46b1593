"""What a run prints, and the goals that this package set itself, judged from rows of a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lab.rows import COPIES, NO_ROOM, OK, OURS, TORCH_BEST, TORCH_SPARSE, Row
from lab.suites import SMALL_TENSORS
from lab.tables import Column


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


LARGE = 100_000_000  # parameters of a large model
MANY_ROWS = 100_000  # touched ones, from which on a step of embeddings has a share as its goal
EXTRA_MEMORY = 0.1  # percent of parameters, gradients and state
CLOCKS = {"GPU": "gpu_us", "wall": "wall_us"}
DIGITS = {" %": 1, "x": 2}  # of what is reached, by its unit

Group = dict[str, Row]  # by implementation
Pair = tuple[Row, Group]  # ours, and what it is compared with


class Goal(NamedTuple):
    """One goal and how near the worst row comes to it."""

    text: str
    reached: str
    met: bool


def judged(rows: Iterable[Row]) -> Iterator[Goal]:
    """The goals about which these rows say something."""
    groups: dict[tuple[str, ...], Group] = defaultdict(dict)
    for row in rows:
        if row.status == OK and row.gpu_us:
            groups[row.group][row.implementation] = row
    pairs = [(group[OURS], group) for group in groups.values() if OURS in group]
    dense = [pair for pair in pairs if not pair[0].batch]
    large = [pair for pair in dense if pair[0].params >= LARGE]
    foreach = [pair for pair in large if pair[0].rule not in ("sgd", "momentum")]
    sweep = [pair for pair in dense if pair[0].suite == "sweep"]
    small = [pair for pair in dense if pair[0].layout == SMALL_TENSORS]
    embeddings = [pair for pair in pairs if pair[0].batch]
    many = [pair for pair in embeddings if (pair[0].unique_rows or 0) >= MANY_ROWS]
    by_rows = {
        rule: [
            (row, groups.get((row.layout, "adagrad", row.storage), {}))
            for row, _ in embeddings
            if row.rule == rule
        ]
        for rule in ("adagrad", "rowwise-adagrad")
    }

    def speedup(wanted: float, what: str, pairs: Sequence[Pair], *names: str) -> Iterator[Goal]:
        for clock, column in CLOCKS.items():
            text = f"{what}, {clock} time"
            yield from _at_least(wanted, "x", text, _speedups(pairs, column, names))

    percent = "of copy bandwidth from 100 M parameters up"
    yield from _at_least(95.0, " %", percent, _shares(large))
    yield from speedup(1.0, "the best of torch's own in the sweep", sweep, *TORCH_BEST)
    what = "foreach Adagrad and RMSprop, large"
    yield from _at_least(2.5, "x", what, _speedups(foreach, "gpu_us", ("torch foreach",)))
    yield from speedup(3.0, "fused torch on 1,000 small tensors", small, "torch fused")
    yield from _memory([row for row, _ in large])
    for rule, found in by_rows.items():
        yield from speedup(10.0, f"torch's sparse Adagrad by {rule}", found, TORCH_SPARSE)
    percent = f"of copy bandwidth on touched bytes, from {MANY_ROWS:,} rows up"
    yield from _at_least(80.0, " %", percent, _shares(many))


def _shares(pairs: Sequence[Pair]) -> list[tuple[float, Row]]:
    return [(row.percent_of_copy, row) for row, _ in pairs if row.percent_of_copy]


def _speedups(pairs: Sequence[Pair], column: str, names: Sequence[str]) -> list[tuple[float, Row]]:
    """Over the best of these implementations."""
    return [
        (min(getattr(other, column) for other in others) / getattr(row, column), row)
        for row, group in pairs
        if (others := [group[name] for name in names if name in group])
    ]


def _at_least(
    wanted: float, unit: str, what: str, found: Sequence[tuple[float, Row]]
) -> Iterator[Goal]:
    if found:
        value, row = min(found, key=lambda pair: pair[0])
        reached = round(value, DIGITS[unit])
        text = f"{reached:.{DIGITS[unit]}f}{unit} ({_where(row)})"
        yield Goal(f"at least {wanted:g}{unit} {what}", text, reached >= wanted)


def _memory(rows: Iterable[Row]) -> Iterator[Goal]:
    shares = [
        (100 * (row.peak_bytes - row.model_bytes) / row.model_bytes, row)
        for row in rows
        if row.model_bytes and row.peak_bytes is not None
    ]
    if shares:
        share, row = max(shares, key=lambda pair: pair[0])
        reached = f"{share:.3f} % ({_where(row)})"
        yield Goal(f"extra memory under {EXTRA_MEMORY:g} %", reached, share < EXTRA_MEMORY)


def _where(row: Row) -> str:
    return f"{row.layout}, {row.rule}, {row.storage}"
