"""Embedding tables with sparse gradients, and the check that they are stepped rightly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

DISTRIBUTIONS = ("uniform", "zipf")
ZIPF_EXPONENT = 1.05  # the row of rank k has a share of k**-1.05
BATCHES = 3  # gradients that take turns while steps are timed
CHECKED = (0, 1, 0)  # batches of the checked steps: rows of the first rest while the second steps
UNITS = 8  # in the last place, that an addition may be off
PROBED = 4096  # rows of a table that are checked, about; all where it has no more
FREQUENT = 8  # the most frequent rows, which are checked in any case
GOLDEN = 0.618  # spreads multiples evenly


class Shape(NamedTuple):
    """Tables, all alike, each of which gets a gradient of `batch` rows."""

    rows: int
    dim: int
    batch: int
    distribution: str
    tables: int = 1

    @property
    def table_bytes(self) -> int:
        """Of all tables."""
        return 4 * self.tables * self.rows * self.dim

    @property
    def value_bytes(self) -> int:
        """Of the values of one batch's gradients."""
        return 4 * self.tables * self.batch * self.dim

    def __str__(self) -> str:
        tables = "1 table" if self.tables == 1 else f"{self.tables} tables"
        return f"{tables} of {self.rows:,} x {self.dim}, {self.batch:,} ids {self.distribution}"


class Candidate(Protocol):
    """What is checked and timed."""

    @property
    def tables(self) -> Sequence[Tensor]:
        """That it steps."""

    def load(self, batch: int) -> None:
        """Make this batch's gradients those of the next steps."""

    def step(self) -> object: ...


class Reference(Protocol):
    """An optimizer over float64 parameters with dense gradients."""

    def step(self) -> object: ...


def ids_of(shape: Shape, device: str, generator: torch.Generator) -> Callable[[], Tensor]:
    """What draws the ids of one table's batch, with duplicates."""
    rows, size = shape.rows, (shape.batch,)
    if shape.distribution == "uniform":
        return lambda: torch.randint(rows, size, device=device, generator=generator)
    ranks = torch.arange(1, rows + 1, dtype=torch.float64, device=device)
    cumulative = ranks.pow_(-ZIPF_EXPONENT).cumsum_(0)
    # Frequent rows are to lie all over the table, as hashed ids do: each rank has a row of its own.
    factor = next(n for n in count(max(1, int(GOLDEN * rows))) if math.gcd(n, rows) == 1)

    def draw() -> Tensor:
        drawn = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
        found = torch.searchsorted(cumulative, drawn * cumulative[-1], right=True)
        return found.clamp_(max=rows - 1) * factor % rows

    return draw


class Embeddings:
    """Tables, and gradients of some batches, uncoalesced as `nn.Embedding(sparse=True)` makes them.

    Values are odd eighths: sums of them are exact in float32, whatever their order, so that
    duplicates ask for no tolerance. The batches share them.

    Attributes:
        tables: float32, which those that step them share.
        values: of the gradient of each table.
        ids: int64, by batch and table.
        grads: sparse COO, by batch and table.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        self._generator = generator = torch.Generator(device).manual_seed(0)
        draw, n_tables = ids_of(shape, device, generator), range(shape.tables)
        self.ids = [[draw() for _ in n_tables] for _ in range(BATCHES)]
        del draw  # and what Zipf's distribution takes
        size, batch = (shape.rows, shape.dim), (shape.batch, shape.dim)
        self.tables = [torch.randn(size, device=device, generator=generator) for _ in n_tables]
        self.values = [torch.empty(batch, device=device) for _ in n_tables]
        self.new_values()
        self.grads = [[*map(self._gradient, ids, self.values)] for ids in self.ids]

    def _gradient(self, ids: Tensor, values: Tensor) -> Tensor:
        size = (self.shape.rows, self.shape.dim)
        return torch.sparse_coo_tensor(ids[None], values, size, check_invariants=False)

    @staticmethod
    def size(shape: Shape) -> int:
        """Bytes of tables, gradients and what it takes to draw them."""
        ids = 8 * BATCHES * shape.tables * shape.batch
        zipf = 16 * shape.rows if shape.distribution == "zipf" else 0
        return shape.value_bytes + ids + max(shape.table_bytes, zipf)

    def new_values(self) -> None:
        """Random ones, at the same addresses."""
        for values in self.values:
            values.random_(0, 8, generator=self._generator).mul_(2).sub_(7).div_(8)

    def counted(self) -> tuple[int, int]:
        """Rows of all tables that a batch touches, in the mean; how often one does so at most."""
        counts = [torch.unique(ids, return_counts=True)[1] for batch in self.ids for ids in batch]
        return round(sum(map(len, counts)) / BATCHES), max(int(n.max()) for n in counts)

    def summed(self, batch: int, table: int, rows: Tensor) -> Tensor:
        """The gradients of some rows, which ascend, in float64."""
        ids, values = self.ids[batch][table], self.values[table]
        places = torch.searchsorted(rows, ids).clamp_(max=len(rows) - 1)
        found = rows[places] == ids
        sums = torch.zeros(len(rows), self.shape.dim, dtype=torch.float64, device=ids.device)
        sums.index_add_(0, places[found], values[found].double())
        return sums

    def probes(self) -> list[Tensor]:
        """The rows of every table that are checked.

        Touched ones, the most frequent among them, and their neighbours, most of which are not.
        """
        return [self._probed(table) for table in range(self.shape.tables)]

    def _probed(self, table: int) -> Tensor:
        ids = torch.cat([self.ids[batch][table] for batch in sorted({*CHECKED})])
        rows = self.shape.rows
        if rows <= PROBED:
            return torch.arange(rows, device=ids.device)
        touched, counts = torch.unique(ids, return_counts=True)
        n, last = min(len(touched), PROBED // 2), len(touched) - 1
        spread = touched[torch.linspace(0, last, n, dtype=torch.float64).long().to(ids.device)]
        frequent = touched[counts.topk(min(FREQUENT, len(touched))).indices]
        ends = torch.tensor([0, rows - 1], device=ids.device)
        chosen: Tensor = torch.unique(torch.cat([spread, (spread + 1) % rows, frequent, ends]))
        return chosen


def tolerance(additions: int = 1) -> float:
    """The largest error that a right implementation makes in the checked steps, relative.

    Args:
        additions: to an element in a step. Each rounds it, up or down by chance.
    """
    return len(CHECKED) * UNITS * math.sqrt(additions) * torch.finfo(torch.float32).eps


def check(
    work: Embeddings, candidate: Candidate, reference: Callable[[list[Parameter]], Reference]
) -> float:
    """Take steps with new gradients, beside a reference in float64 over some rows.

    Rules work row by row, so that the reference needs only those rows.

    Returns:
        The largest error, relative to the value where that is above 1.
    """
    probes = work.probes()

    def probed() -> list[Tensor]:
        return [
            table.detach()[rows].double()
            for table, rows in zip(candidate.tables, probes, strict=True)
        ]

    exact = [Parameter(values) for values in probed()]
    expected = reference(exact)
    for batch in CHECKED:
        work.new_values()
        candidate.load(batch)
        candidate.step()
        for table, param in enumerate(exact):
            param.grad = work.summed(batch, table, probes[table])
        expected.step()
    errors = [
        ((found - param).abs() / param.abs().clamp(min=1)).max()
        for found, param in zip(probed(), (param.detach() for param in exact), strict=True)
    ]
    return float(torch.stack(errors).max())
