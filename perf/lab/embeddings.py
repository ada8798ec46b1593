"""Embedding tables with sparse gradients, and the check that they are stepped rightly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import count, cycle
from typing import Any

import torch
from torch import Tensor

from lab.embedding_steps import EMBEDDING_IMPLEMENTATIONS, Candidate
from lab.embedding_tables import BATCHES, UNIFORM, Tables
from lab.implementations import Implementation, Step
from lab.reference import CHECKED_STEPS, Work
from lab.rules import STORAGES, Rule, Storage

CHECKED = (0, 1, 0)  # batches of the checked steps: rows of the first rest while the second steps
UNITS = 8  # in the last place, that an addition may be off
PROBED = 4096  # rows of a table that are checked, about; all where it has no more
FREQUENT = 8  # the most frequent rows, which are checked in any case
ZIPF_EXPONENT = 1.05  # the row of rank k has a share of k**-1.05
GOLDEN = 0.618  # spreads multiples evenly
PASSING_VALUES = 8  # times the gradients' values that sorting and summing them may take


class Embeddings(Work):
    """Tables, and gradients of some batches, uncoalesced as `nn.Embedding(sparse=True)` makes them.

    Values are odd eighths: sums of them are exact in float32, whatever their order, so that
    duplicates ask for no tolerance. The batches share them.

    Attributes:
        tables: float32, which those that step them share.
        values: of the gradient of each table.
        ids: int64, by batch and table.
        grads: sparse COO, by batch and table.
    """

    implementations: tuple[Implementation, ...] = EMBEDDING_IMPLEMENTATIONS

    def __init__(self, shape: Tables, rule: Rule, _: Storage, device: str) -> None:
        self.shape, self.rule, self._batches = shape, rule, cycle(range(BATCHES))
        self._generator = generator = torch.Generator(device).manual_seed(0)
        draw, n_tables = ids_of(shape, device, generator), range(shape.tables)
        self.ids = [[draw() for _ in n_tables] for _ in range(BATCHES)]
        del draw  # and what Zipf's distribution takes
        size, batch = (shape.rows, shape.dim), (shape.batch, shape.dim)
        self.tables = [torch.randn(size, device=device, generator=generator) for _ in n_tables]
        self.values = [torch.empty(batch, device=device) for _ in n_tables]
        self.new_values()
        self.grads = [
            [torch.sparse_coo_tensor(of[None], values, size, check_invariants=False)
             for of, values in zip(ids, self.values, strict=True)]
            for ids in self.ids
        ]  # fmt: skip

    def drawn(self) -> dict[str, Any]:
        unique_rows, _ = self.counted()
        return {
            "unique_rows": unique_rows,
            "step_bytes": self.shape.step_bytes(self.rule, unique_rows),
        }

    def tolerance(self, implementation: Implementation) -> float:
        """The largest error of one that is right."""
        one_by_one = self.rule.name in implementation.one_by_one
        return tolerance(self.counted()[1] if one_by_one else 1)

    def needed(self, implementation: Implementation) -> tuple[int, int]:
        shape, state = self.shape, self.shape.state_bytes(self.rule, STORAGES[0])
        kept = implementation.tables * shape.table_bytes + state
        passing = implementation.passing * shape.table_bytes
        return kept, max(PASSING_VALUES * shape.value_bytes, passing)

    def build(self, implementation: Implementation) -> Candidate:
        candidate: Candidate = implementation.build(self.rule, self)
        candidate.load(0)
        return candidate

    def renew(self, steps: Iterable[Step]) -> None:
        """The next batch for all."""
        batch = next(self._batches)
        for step in steps:
            if isinstance(step, Candidate):
                step.load(batch)

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

    def probed(self, candidate: Candidate) -> list[Tensor]:
        named = zip(candidate.tables, self.probes(), strict=True)
        return [table.detach()[rows].double() for table, rows in named]

    def new_probed_gradients(self, candidate: Candidate, number: int) -> list[Tensor]:
        self.new_values()
        candidate.load(CHECKED[number])
        return [self.summed(CHECKED[number], i, rows) for i, rows in enumerate(self.probes())]


def tolerance(additions: int = 1) -> float:
    """The largest error that a right implementation makes in the checked steps, relative.

    Args:
        additions: to an element in a step. Each rounds it, up or down by chance.
    """
    return CHECKED_STEPS * UNITS * math.sqrt(additions) * torch.finfo(torch.float32).eps


def ids_of(tables: Tables, device: str, generator: torch.Generator) -> Callable[[], Tensor]:
    """What draws the ids of one table's batch, with duplicates."""
    rows, size = tables.rows, (tables.batch,)
    if tables.distribution == UNIFORM:
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
