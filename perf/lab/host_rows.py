"""The rows that bench_host.py writes."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lab.rows import OURS, read_as

FLOOR = "floor"
TORCH = ("fused", "foreach", "for-loop")
SERIES = (FLOOR, OURS, *TORCH)
PLAIN, DTENSOR = PARAMS = ("plain", "dtensor")
STAY, FRESH, CHANGING, FIRST = GRADIENTS = ("stay", "fresh", "changing", "first")
COLD = "cold"  # the first step of a process whose Triton cache is empty
LAUNCH, TRITON_LAUNCH = LAUNCHES = ("launch", "launch by Triton")


class Row(NamedTuple):
    """Microseconds of one step."""

    machine: str
    rule: str
    params: str
    tensors: int
    groups: int
    gradients: str
    implementation: str
    repeats: int
    median: float
    p20: float
    p80: float


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([f"{x:.2f}" if isinstance(x, float) else x for x in row] for row in rows)


def read(path: Path) -> list[Row]:
    return read_as(Row, path)


def found(rows: Iterable[Row], **columns: object) -> list[Row]:
    """Those with these values in these columns."""
    return [row for row in rows if all(getattr(row, key) == columns[key] for key in columns)]
