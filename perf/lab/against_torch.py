"""What the CSV files of the benchmarks say: ours beside the best of torch's own.

Columns are read by name, and need not all be there.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

OURS = "triton_optim"
OK = "ok"
COPIES = ("copy", "mixed copy")

Row = Mapping[str, str]
Key = tuple[str, ...]
Group = dict[str, Row]  # by implementation


class Source(NamedTuple):
    """The files of one benchmark.

    Attributes:
        title: what was measured.
        files: their pattern.
        key: the columns that rows have in common when they were measured together.
        clocks: the columns of times in microseconds, by name.
        rivals: torch's own implementations that a user could choose instead.
        sparse: whether its rows are those of sparse gradients, which have a batch.
    """

    title: str
    files: str
    key: Key
    clocks: dict[str, str]
    rivals: Key
    sparse: bool = False


CLOCKS = {"GPU": "gpu_us", "wall": "wall_us", "host": "host_us"}
SOURCES = (
    Source(
        "A step of dense gradients",
        "step-*.csv",
        ("suite", "layout", "tensors", "params", "rule", "storage"),
        CLOCKS,
        ("torch fused", "torch foreach", "torch compiled"),
    ),
    Source(
        "A step of sparse gradients",
        "step-*.csv",
        ("rule", "tensors", "rows", "dim", "batch", "distribution"),
        CLOCKS,
        ("torch sparse", "torch dense"),
        sparse=True,
    ),
    Source(
        "Host time of step(), gradients fresh or not",
        "host.csv",
        ("rule", "tensors", "groups", "gradients"),
        {"host": "median"},
        ("fused", "foreach"),
    ),
)


class Duel(NamedTuple):
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


def groups(source: Source, folder: Path) -> dict[Key, Group]:
    """Rows that were measured together; of several measurements the latest."""
    found: dict[Key, dict[str, Group]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob(source.files)):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = tuple(row.get(column) or "" for column in source.key)
                name = row.get("implementation") or ""
                if name not in COPIES and bool(row.get("batch")) == source.sparse:
                    found[key][row.get("date") or ""][name] = row
    return {key: by_date[max(by_date)] for key, by_date in found.items()}


def microseconds(row: Row | None, clock: str) -> float | None:
    """A time of a row, if it has one."""
    if row is None or row.get("status", OK) != OK:
        return None
    try:
        return float(row.get(clock) or "")
    except ValueError:
        return None


def duels(source: Source, found: Mapping[Key, Group]) -> Iterator[Duel]:
    """Every time of ours for which torch has one, too."""
    for key, group in found.items():
        for clock, column in source.clocks.items():
            ours = microseconds(group.get(OURS), column)
            times = _times(source, group, column)
            if ours and times:
                best = min(times, key=lambda name: times[name])
                yield Duel(what(source, key), clock, ours, times[best], best)


def without_time(source: Source, found: Mapping[Key, Group]) -> Iterator[str]:
    """Where torch has a time and ours has none, and why."""
    column = next(iter(source.clocks.values()))
    for key, group in found.items():
        if _times(source, group, column) and microseconds(group.get(OURS), column) is None:
            row = group.get(OURS, {})
            why = ": ".join(filter(None, (row.get("status"), row.get("detail"))))
            yield f"{what(source, key)}: {why or 'no row'}"


def _times(source: Source, group: Group, column: str) -> dict[str, float]:
    times = {name: microseconds(group.get(name), column) for name in source.rivals}
    return {name: time for name, time in times.items() if time is not None}


def what(source: Source, key: Iterable[str]) -> str:
    """A group's name: columns that hold numbers say which."""
    named = zip(source.key, key, strict=True)
    return ", ".join(f"{value} {name}" if value.isdigit() else value for name, value in named)
