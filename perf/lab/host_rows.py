"""The rows that bench_host.py writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lab import rows
from lab.rows import OURS

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


def write(path: Path, lines: Iterable[Row]) -> None:
    named = (row._asdict().items() for row in lines)
    short = ({n: f"{x:.2f}" if isinstance(x, float) else x for n, x in line} for line in named)
    rows.write(path, Row._fields, short)


def read(path: Path) -> list[Row]:
    return rows.read_as(Row, path)


def found(lines: Iterable[Row], **columns: object) -> list[Row]:
    """Those with these values in these columns."""
    return [row for row in lines if all(getattr(row, key) == columns[key] for key in columns)]
