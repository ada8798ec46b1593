"""Writes the tables of the READMEs that are made from the CSV files of perf/results.

    python perf/readme_tables.py

GPU time in README.md and, of storage formats, in triton_optim/README.md; host time there too, and
in perf/README.md what a step costs on many ranks, which is computed.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lab import gpu_tables, scaling, tables
from lab import host_rows as columns
from lab.host_rows import DTENSOR, FRESH, PLAIN, SERIES, Row, found, read
from lab.rows import OURS
from lab.rules import TITLES

HEAD = ("tensors", *(f"torch {name}" if name in columns.TORCH else name for name in SERIES))
FRESH_SHOWN = ((PLAIN, 10), (PLAIN, 300), (PLAIN, 1000), (DTENSOR, 300))
COUNTS_SHOWN = (300, 20_000)


def report(rows: Sequence[Row]) -> str:
    """Tables of medians, and sentences."""
    fresh = [
        [TITLES[rule], *_cells(rows, rule, *shown, FRESH)]
        for rule in TITLES
        if found(rows, rule=rule)
        for shown in FRESH_SHOWN
    ]
    changes = [
        [gradients, *_cells(rows, "rmsprop", params, tensors, gradients)]
        for tensors in COUNTS_SHOWN
        for params in columns.PARAMS
        for gradients in columns.GRADIENTS
    ]
    return "\n\n".join(
        (
            f"On {rows[0].machine}; fresh gradients:",
            tables.markdown(("", *HEAD), fresh),
            "RMSprop, by what its gradients do:",
            tables.markdown(("gradients", *HEAD), changes),
            tables.paragraph(" ".join((_groups(rows), _launches(rows), _cold(rows)))),
        )
    )


def _cells(rows: Sequence[Row], rule: str, params: str, tensors: int, gradients: str) -> list[str]:
    case = found(rows, rule=rule, params=params, tensors=tensors, gradients=gradients, groups=1)
    medians = {row.implementation: f"{row.median:,.0f}" for row in case}
    times = [medians.get(name, "none") for name in SERIES]
    return [f"{tensors:,}" + " DTensors" * (params == DTENSOR), *times]


def _groups(rows: Sequence[Row]) -> str:
    ours = found(rows, params=PLAIN, gradients=FRESH, implementation=OURS)
    one = {(row.rule, row.tensors): row.median for row in ours if row.groups == 1}
    ratios = [row.median / one[row.rule, row.tensors] for row in ours if row.groups == 20]
    change = 100 * (statistics.median(ratios) - 1)
    return (
        f"20 groups instead of one changed our time by {change:+.0f} %, in the median of "
        f"{len(ratios)} pairs."
    )


def _launches(rows: Sequence[Row]) -> str:
    directly, by_triton = (found(rows, implementation=name)[0].median for name in columns.LAUNCHES)
    return (
        f"A launch took {directly:.0f} us directly and {by_triton:.0f} us by Triton's launcher, "
        "up to the driver."
    )


def _cold(rows: Sequence[Row]) -> str:
    """The first rule of a process also compiles what others share."""
    cold = found(rows, gradients=columns.COLD)
    ours, theirs = (
        [row.median / 1e6 for row in found(cold, params=DTENSOR, implementation=name)]
        for name in (OURS, "foreach")
    )
    return (
        f"The first step of a process, Triton's cache empty, took {ours[0]:.1f} s over "
        f"{cold[0].tensors} DTensors, and {min(ours[1:]):.1f} to {max(ours[1:]):.1f} s with each "
        f"further rule; torch's foreach, which propagates their shardings then, {theirs[0]:.1f} s, "
        f"and {min(theirs[1:]):.1f} to {max(theirs[1:]):.1f} s."
    )


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results"


def texts() -> dict[Path, str]:
    """The files as they must be."""
    host, gpu = read(RESULTS / "host-cpu.csv"), gpu_tables.measured(RESULTS)
    front, guide, perf = (ROOT / folder / "README.md" for folder in ("", "triton_optim", "perf"))
    parts = (
        (front, "GPU time", gpu_tables.beside_torch(gpu)),
        (guide, "GPU time by storage", gpu_tables.by_storage(gpu)),
        (guide, "host time", report(host)),
        (perf, "scaling", scaling.table(host)),
    )
    found = {path: path.read_text() for path in (front, guide, perf)}
    for path, name, part in parts:
        found[path] = tables.with_part(found[path], name, part)
    return found


def main() -> None:
    ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    for path, text in texts().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
