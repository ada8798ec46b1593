"""One Markdown page about a folder of logs and CSV files: what ran, what failed, who is faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.against_torch import (
    SOURCES,
    Comparison,
    Group,
    Key,
    Source,
    comparisons,
    groups,
    time,
    without_time,
)
from lab.parts import FAILED, OUT_OF_TIME, Record
from lab.report import judged
from lab.rows import OK, OURS
from lab.tables import markdown

QUOTED = 25  # lines of what failed


def write(folder: Path, names: Sequence[str], records: Mapping[str, Record]) -> None:
    """Write `README.md` into the folder."""
    raw = folder / "raw"
    found = [(source, groups(source, raw)) for source in SOURCES]
    compared: list[Comparison] = []
    missing: list[str] = []
    for source, by_key in found:
        for key, group in by_key.items():
            compared += comparisons(source, key, group)
            missing += without_time(source, key, group)
    compared.sort(key=lambda one: one.speedup)
    machine = (line.partition(": ")[::2] for line in _lines(raw / "machine.log"))
    parts = [
        *_head(compared, missing, records),
        *("## Machine", markdown(("", ""), machine)),
        *("## Beside torch, what is slowest first", _speedups(compared)),
        "\n".join(f"- no time of ours, {line}" for line in missing),
        *(text for source, by_key in found for text in _source(source, by_key)),
        *_goals(row for _, by_key in found[:2] for g in by_key.values() for row in g.values()),
        *_plots(folder),
        *("## What ran", _outcomes(names, records)),
        *_failures(names, records, raw),
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n")


def _head(
    compared: Sequence[Comparison], missing: Sequence[str], records: Mapping[str, Record]
) -> Iterator[str]:
    yield "# triton_optim beside torch on this GPU"
    yield (
        "Written by `python perf/gpu_report.py`; perf/README.md says what every figure means.\n"
        "Times are medians in microseconds. A speedup is torch's time over ours, where torch's is\n"
        "the best of its own implementations that was right; 1.00 is level."
    )
    lines = []
    for clock in dict.fromkeys(one.clock for one in compared):
        speedups = [one.speedup for one in compared if one.clock == clock]
        ahead, behind = sum(s > 1 for s in speedups), sum(s < 1 for s in speedups)
        lines.append(
            f"- {clock} time: ahead of torch in {ahead} of {len(speedups)} comparisons, "
            f"level in {len(speedups) - ahead - behind}, **behind in {behind}**"
        )
    if missing:
        lines.append(f"- **without a time of ours** where torch has one: {len(missing)}")
    for outcome in dict.fromkeys(record.outcome for record in records.values()):
        names = [name for name, record in records.items() if record.outcome == outcome]
        lines.append(f"- parts that are {outcome}: {', '.join(names)}")
    yield "\n".join(lines)


def _speedups(compared: Sequence[Comparison]) -> str:
    rows = (
        [one.what, one.clock, f"{one.ours:.1f}", f"{one.torch:.1f}", one.by, f"{one.speedup:.2f}"]
        for one in compared
    )
    head = ("what", "clock", OURS, "torch", "its best", "speedup")
    return markdown(head, rows) if compared else "Nothing has been compared yet."


def _source(source: Source, found: Mapping[Key, Group]) -> Iterator[str]:
    clock, column = next(iter(source.clocks.items()))
    yield f"## {source.title}: {clock} time"
    shares = (name.replace("_", " ") for name in source.shares)
    head = [*source.key, OURS, *shares, *source.rivals]
    rows = (_cells(source, key, group, column) for key, group in found.items())
    yield markdown(head, rows) if found else "No row yet."


def _cells(source: Source, key: Key, group: Group, column: str) -> Iterator[str]:
    ours = time(group.get(OURS), column)
    yield from (f"{value:,}" if isinstance(value, int) else f"{value}" for value in key)
    for name in (OURS, *source.rivals):
        row = group.get(name)
        us, status = time(row, column), getattr(row, "status", OK)
        speedup = f" ({us / ours:.2f})" if us and ours and name != OURS else ""
        yield f"{us:.1f}{speedup}" if us is not None else status.removeprefix(OK)
        if name == OURS:
            values = (time(row, share) for share in source.shares)
            yield from ("" if share is None else f"{share:.1f}" for share in values)


def _goals(measured: Iterable[Any]) -> Iterator[str]:
    """Those that were missed first."""
    if goals := sorted(judged(measured), key=lambda goal: goal.met):
        yield "## Goals of this package"
        rows = (["met" if goal.met else "MISSED", goal.text, goal.reached] for goal in goals)
        yield markdown(("", "goal", "worst row"), rows)


def _plots(folder: Path) -> Iterator[str]:
    pictures = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    if pictures:
        yield "## Plots"
        yield "\n".join(f"![{name}]({name})" for name in pictures)


def _outcomes(names: Sequence[str], records: Mapping[str, Record]) -> str:
    rows = []
    for name in names:
        record = records.get(name, Record("not begun yet"))
        log = f"[log](raw/{name}.log)" if record.seconds else ""
        seconds = f"{record.seconds:.0f} of {record.limit:.0f}" if record.seconds else ""
        rows.append([name, record.outcome, seconds, record.date, log, record.detail])
    head = ("part", "outcome", "seconds, of at most", "begun, UTC", "", "its last line, or why")
    return markdown(head, rows)


def _failures(names: Sequence[str], records: Mapping[str, Record], raw: Path) -> Iterator[str]:
    for name in names:
        record = records.get(name)
        if record is not None and record.outcome in (FAILED, OUT_OF_TIME):
            printed = "\n".join(_lines(raw / f"{name}.log")[-QUOTED:]).replace("```", "'''")
            yield f"### {name}: {record.outcome}"
            yield f"```text\n{printed}\n```"


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []
