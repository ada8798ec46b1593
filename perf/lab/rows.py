"""One row a measurement, and the CSV files that hold them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Kind = TypeVar("Kind")

OK = "ok"
RIGHT = "right"  # and not to be timed
WRONG = "wrong"
NO_ROOM = "does not fit"
NOT_AVAILABLE = "n/a"
FAILED = "failed"


@dataclass
class Row:
    """What one implementation did on one layout; see README.md for each column."""

    date: str = ""
    machine: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    suite: str = ""
    layout: str = ""
    tensors: int = 0
    params: int = 0
    rows: int | None = None
    dim: int | None = None
    batch: int | None = None
    distribution: str = ""
    unique_rows: int | None = None
    rule: str = ""
    storage: str = ""
    implementation: str = ""
    version: str = ""
    status: str = ""
    detail: str = ""
    error: float | None = None
    tolerance: float | None = None
    repeats: int | None = None
    gpu_us: float | None = None
    gpu_us_p20: float | None = None
    gpu_us_p80: float | None = None
    wall_us: float | None = None
    wall_us_p20: float | None = None
    wall_us_p80: float | None = None
    host_us: float | None = None
    host_us_p20: float | None = None
    host_us_p80: float | None = None
    gaps: float | None = None
    launches: int | None = None
    step_bytes: int | None = None
    l2: str = ""
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    percent_of_copy: float | None = None
    mixed_copy_gb_per_s: float | None = None
    percent_of_mixed_copy: float | None = None
    peak_gb_per_s: float | None = None
    percent_of_peak: float | None = None
    step_extra_bytes: int | None = None
    kept_bytes: int | None = None
    model_bytes: int | None = None
    peak_bytes: int | None = None
    first_ms: float | None = None
    cold: bool = False

    @property
    def group(self) -> tuple[str, str, str]:
        """What the rows that were measured together have in common."""
        return self.layout, self.rule, self.storage


COLUMNS = [field.name for field in fields(Row)]


class Table:
    """A CSV file that grows row by row."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; they are on the disk when this returns."""
        self.rows += rows
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            write(file, COLUMNS, rows, header=new)

    def rewrite(self) -> None:
        """Write all rows once more, after they were changed."""
        with self.path.with_suffix(".new").open("w", newline="") as file:
            write(file, COLUMNS, self.rows, header=True)
        self.path.with_suffix(".new").replace(self.path)


def write(file: Any, columns: Sequence[str], rows: Iterable[Any], *, header: bool) -> None:
    """Write dataclasses as lines of a CSV file."""
    writer = csv.DictWriter(file, columns)
    if header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a file; see `read_as`."""
    return read_as(Row, path)


def read_as(kind: type[Kind], path: Path) -> list[Kind]:
    """Lines of a CSV file, as a class that has its columns.

    Raises:
        ValueError: it has other columns, or a value of another type.
    """
    types = get_type_hints(kind)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [*types]:
            raise ValueError(f"{path} has other columns than {kind.__module__}")
        return [kind(**{n: _parsed(types[n], text) for n, text in line.items()}) for line in reader]


def _parsed(kind: Any, text: str) -> Any:
    if kind in (str, int, float):
        return kind(text)
    if kind is bool:
        return text == "True"
    if text == "":
        return None
    return int(text) if kind == int | None else float(text)
