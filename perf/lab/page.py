"""One Markdown page about a folder of logs and CSV files: what ran, what failed, who is faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from lab.against_torch import (
    OURS,
    SOURCES,
    Duel,
    Group,
    Key,
    Row,
    Source,
    duels,
    groups,
    microseconds,
    without_time,
)
from lab.parts import FAILED, OK, OUT_OF_TIME, Record

QUOTED = 25  # lines of what failed
MET, MISSED = "  met ", "  MISSED "  # how report.py begins a line about a goal


def write(folder: Path, names: Sequence[str], records: Mapping[str, Record]) -> None:
    """Write `README.md` into the folder."""
    raw = folder / "raw"
    found = [(source, groups(source, raw)) for source in SOURCES]
    compared = [*chain.from_iterable(duels(*measured) for measured in found)]
    missing = [*chain.from_iterable(without_time(*measured) for measured in found)]
    lines = [
        *_head(compared, missing, records),
        *_machine(raw / "machine.log"),
        *_behind(compared, missing),
        *_ahead(compared),
        *chain.from_iterable(_source(*measured) for measured in found),
        *_goals(names, raw),
        *_plots(folder),
        *_parts(names, records),
        *_failures(names, records, raw),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _head(
    compared: Sequence[Duel], missing: Sequence[str], records: Mapping[str, Record]
) -> Iterator[str]:
    yield "# triton_optim beside torch on this GPU"
    yield ""
    yield "Written by `python perf/gpu_report.py`; perf/README.md says what every figure means."
    yield "Times are medians in microseconds. A speedup is torch's time over ours, where torch's is"
    yield "the best of its own implementations that was right; 1.00 is level."
    yield ""
    for clock in dict.fromkeys(duel.clock for duel in compared):
        speedups = [duel.speedup for duel in compared if duel.clock == clock]
        ahead, behind = sum(s > 1 for s in speedups), sum(s < 1 for s in speedups)
        yield (
            f"- {clock} time: ahead of torch in {ahead} of {len(speedups)} comparisons, "
            f"level in {len(speedups) - ahead - behind}, **behind in {behind}**"
        )
    if missing:
        yield f"- **without a time of ours** where torch has one: {len(missing)}"
    if not compared:
        yield "- nothing has been compared yet"
    for outcome in dict.fromkeys(record.outcome for record in records.values()):
        names = [name for name, record in records.items() if record.outcome == outcome]
        yield f"- parts that are {outcome}: {', '.join(names)}"
    yield ""


def _machine(log: Path) -> Iterator[str]:
    yield from ("## Machine", "")
    yield from _table(("", ""), (line.partition(": ")[::2] for line in _lines(log)))


def _behind(compared: Iterable[Duel], missing: Sequence[str]) -> Iterator[str]:
    slower = sorted((duel for duel in compared if duel.speedup < 1), key=lambda d: d.speedup)
    yield from ("## Behind torch", "")
    yield from _duels(slower)
    for line in missing:
        yield f"- no time of ours, {line}"
    if missing:
        yield ""


def _ahead(compared: Iterable[Duel]) -> Iterator[str]:
    faster = sorted((duel for duel in compared if duel.speedup > 1), key=lambda d: -d.speedup)
    yield from ("## Ahead of torch", "")
    yield from _duels(faster)


def _duels(compared: Sequence[Duel]) -> Iterator[str]:
    if not compared:
        yield from ("In nothing that was compared.", "")
        return
    yield from _table(
        ("what", "clock", OURS, "torch", "its best", "speedup"),
        ([duel.what, duel.clock, f"{duel.ours:.1f}", f"{duel.torch:.1f}", duel.by,
          f"{duel.speedup:.2f}"] for duel in compared),
    )  # fmt: skip


def _source(source: Source, found: Mapping[Key, Group]) -> Iterator[str]:
    clock, column = next(iter(source.clocks.items()))
    yield from (f"## {source.title}: {clock} time", "")
    if not found:
        yield from ("No row yet.", "")
        return
    shares = [*dict.fromkeys(name for group in found.values() for row in group.values()
                             for name in row if name and name.startswith("percent"))]  # fmt: skip
    heads = [*source.key, OURS, *(name.replace("_", " ") for name in shares), *source.rivals]
    yield from _table(heads, (_cells(source, key, found[key], column, shares) for key in found))


def _cells(
    source: Source, key: Key, group: Group, column: str, shares: Sequence[str]
) -> Iterator[str]:
    ours = microseconds(group.get(OURS), column)
    yield from (f"{int(value):,}" if value.isdigit() else value for value in key)
    yield _time(group.get(OURS), column)
    for name in shares:
        share = microseconds(group.get(OURS), name)
        yield "" if share is None else f"{share:.1f}"
    for name in source.rivals:
        theirs = microseconds(group.get(name), column)
        speedup = f" ({theirs / ours:.2f})" if theirs and ours else ""
        yield _time(group.get(name), column) + speedup


def _time(row: Row | None, column: str) -> str:
    """Microseconds, or why there are none."""
    time = microseconds(row, column)
    if time is not None:
        return f"{time:.1f}"
    status = row.get("status") if row is not None else None
    return status if status and status != OK else ""


def _goals(names: Iterable[str], raw: Path) -> Iterator[str]:
    """What the benchmarks printed about this package's goals; those that were missed first."""
    goals = []
    for name in names:
        for line in _lines(raw / f"{name}.log"):
            if line.startswith((MET, MISSED)):
                goals.append([*line.split(maxsplit=1), name])
    if goals:
        yield from ("## Goals of this package", "")
        yield from _table(("", "goal: worst row", "part"), sorted(goals))


def _plots(folder: Path) -> Iterator[str]:
    pictures = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    if pictures:
        yield from ("## Plots", "")
        yield from (f"![{name}]({name})" for name in pictures)
        yield ""


def _parts(names: Sequence[str], records: Mapping[str, Record]) -> Iterator[str]:
    yield from ("## What ran", "")
    rows = []
    for name in names:
        record = records.get(name, Record("not begun yet"))
        log = f"[log](raw/{name}.log)" if record.seconds else ""
        seconds = f"{record.seconds:.0f} of {record.limit:.0f}" if record.seconds else ""
        rows.append([name, record.outcome, seconds, record.date, log, record.detail])
    heads = ("part", "outcome", "seconds, of at most", "begun, UTC", "", "its last line, or why")
    yield from _table(heads, rows)


def _failures(names: Sequence[str], records: Mapping[str, Record], raw: Path) -> Iterator[str]:
    for name in names:
        record = records.get(name)
        if record is not None and record.outcome in (FAILED, OUT_OF_TIME):
            printed = _lines(raw / f"{name}.log")
            yield from (f"### {name}: {record.outcome}", "", "```text")
            yield from (line.replace("```", "'''") for line in printed[-QUOTED:])
            yield from ("```", "")


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    yield ""
