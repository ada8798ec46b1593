"""What the CSV files of the benchmarks say: ours beside the best of torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab import host_rows, rows
from lab.rows import COPIES, OK, OURS, TORCH_BEST, TORCH_EMBEDDINGS

Key = tuple[object, ...]
Group = dict[str, Any]  # rows that were measured together, by implementation


class Source(NamedTuple):
    """The files of one benchmark.

    Attributes:
        title: what was measured.
        files: their pattern.
        read: reads one.
        key: the columns that rows have in common when they were measured together.
        clocks: the columns of times in microseconds, by name.
        rivals: torch's own implementations that a user could choose instead.
        shares: columns of percentages.
        sparse: whether its rows are those of sparse gradients, which have a batch.
    """

    title: str
    files: str
    read: Callable[[Path], Sequence[Any]]
    key: tuple[str, ...]
    clocks: dict[str, str]
    rivals: tuple[str, ...]
    shares: tuple[str, ...] = ()
    sparse: bool = False


CLOCKS = {"GPU": "gpu_us", "wall": "wall_us", "host": "host_us"}
SOURCES = (
    Source(
        "A step of dense gradients", "step-*.csv", rows.read,
        ("suite", "layout", "tensors", "params", "rule", "storage"), CLOCKS, TORCH_BEST,
        ("percent_of_copy", "percent_of_mixed_copy", "percent_of_peak"),
    ),
    Source(
        "A step of sparse gradients", "step-*.csv", rows.read,
        ("rule", "tensors", "rows", "dim", "batch", "distribution"), CLOCKS, TORCH_EMBEDDINGS,
        ("percent_of_copy", "percent_of_peak"), sparse=True,
    ),
    Source(
        "Host time of step(), gradients fresh or not", "host.csv", host_rows.read,
        ("rule", "params", "tensors", "groups", "gradients"), {"host": "median"},
        ("fused", "foreach"),
    ),
)  # fmt: skip


class Comparison(NamedTuple):
    """Our time on one group beside that of the best of torch's own; microseconds."""

    what: str
    clock: str
    ours: float
    torch: float
    by: str

    @property
    def speedup(self) -> float:
        """To two digits: what is nearer to 1 than that is level."""
        return round(self.torch / self.ours, 2)


def groups(source: Source, raw: Path) -> dict[Key, Group]:
    """By the columns of the source's key; of several measurements the latest."""
    every = [row for path in sorted(raw.glob(source.files)) for row in source.read(path)]
    dates: dict[Key, str] = {}
    found: dict[Key, Group] = {}
    for row in sorted(every, key=_date):
        if row.implementation not in COPIES and bool(getattr(row, "batch", 0)) == source.sparse:
            key = tuple(getattr(row, column) for column in source.key)
            if dates.setdefault(key, _date(row)) != _date(row):
                dates[key], found[key] = _date(row), {}
            found.setdefault(key, {})[row.implementation] = row
    return found


def _date(row: Any) -> str:
    return getattr(row, "date", "")


def time(row: Any, column: str) -> float | None:
    """Of a row, if there is one and it has it."""
    return getattr(row, column, None) if getattr(row, "status", OK) == OK else None


def rivals_of(source: Source, group: Group, column: str) -> dict[float, str]:
    """The times of torch's own, and whose they are."""
    times = {time(group.get(name), column): name for name in source.rivals}
    return {time: name for time, name in times.items() if time is not None}


def comparisons(source: Source, key: Key, group: Group) -> Iterator[Comparison]:
    """Every time of ours for which torch has one, too."""
    for clock, column in source.clocks.items():
        ours, rivals = time(group.get(OURS), column), rivals_of(source, group, column)
        if ours and rivals:
            yield Comparison(_name(source, key), clock, ours, min(rivals), rivals[min(rivals)])


def without_time(source: Source, key: Key, group: Group) -> Iterator[str]:
    """Where torch has a time and ours has none, and why."""
    column = next(iter(source.clocks.values()))
    if rivals_of(source, group, column) and time(group.get(OURS), column) is None:
        row = group.get(OURS)
        why = f"{row.status}: {row.detail}".removesuffix(": ") if row else "no row"
        yield f"{_name(source, key)}: {why}"


def _name(source: Source, key: Key) -> str:
    """A group's name: columns that hold numbers say which."""
    named = zip(source.key, key, strict=True)
    return ", ".join(f"{v} {name}" if isinstance(v, int) else f"{v}" for name, v in named)
