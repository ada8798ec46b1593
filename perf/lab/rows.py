"""One row a measurement, and the CSV files that hold them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
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

# Implementations.
OURS = "triton_optim"
# torch's own that a user could choose instead: the best of these is what a goal compares with.
TORCH_BEST = ("torch foreach", "torch fused", "torch compiled")
TORCH_SPARSE, TORCH_DENSE = TORCH_EMBEDDINGS = ("torch sparse", "torch dense")
# No optimizers: what bandwidth is measured by. The mixed one has a step's reads and writes.
COPY, MIXED_COPY = COPIES = ("copy", "mixed copy")


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

    def fail(self, error: Exception) -> None:
        self.status = FAILED
        self.detail = f"{type(error).__name__}: {error}".splitlines()[0]


class Table:
    """A CSV file that grows row by row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, rows: Iterable[Row] = ()) -> None:
        """Append rows, and write all that were changed; they are on the disk when this returns."""
        self.rows += rows
        write(self.path, [field.name for field in fields(Row)], map(asdict, self.rows))


def write(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, object]]) -> None:
    """A CSV file, whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    new.replace(path)


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
