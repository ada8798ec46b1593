"""Embedding tables: their sizes, and the bytes of their state and of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

from lab.rules import Rule, Storage

UNIFORM, ZIPF = DISTRIBUTIONS = ("uniform", "zipf")
BATCHES = 3  # gradients that take turns while steps are timed


class Tables(NamedTuple):
    """Tables of float32, all alike, each of which gets a gradient of `batch` rows."""

    rows: int
    dim: int
    batch: int
    distribution: str
    tables: int = 1

    @property
    def name(self) -> str:
        return f"{self.tables} x {self.rows:,} x {self.dim}, {self.batch:,} ids {self.distribution}"

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"{i}", (self.rows, self.dim)) for i in range(self.tables)]

    @property
    def params(self) -> int:
        return self.tables * self.rows * self.dim

    @property
    def table_bytes(self) -> int:
        """Of all tables."""
        return 4 * self.params

    @property
    def value_bytes(self) -> int:
        """Of the values of one batch's gradients."""
        return 4 * self.tables * self.batch * self.dim

    def state_bytes(self, rule: Rule, _: Storage) -> int:
        """Of all tables."""
        return len(rule.states) * self.table_bytes + 4 * rule.row_states * self.tables * self.rows

    def size(self, rule: Rule, storage: Storage) -> int:
        """Bytes of tables, gradients and what it takes to draw them."""
        ids = 8 * BATCHES * self.tables * self.batch
        zipf = 16 * self.rows if self.distribution == ZIPF else 0
        return self.value_bytes + ids + max(self.table_bytes, zipf)

    def step_bytes(self, rule: Rule, unique_rows: int) -> int:
        """What a step must move.

        Values read once; parameter and state of each touched row read once and written once. Not
        the ids, nor what it takes to sort them.
        """
        row = 4 * self.dim * (1 + len(rule.states)) + 4 * rule.row_states
        return self.value_bytes + 2 * unique_rows * row

    def columns(self, rule: Rule, storage: Storage) -> dict[str, Any]:
        """What a row says of these tables."""
        columns = {name: getattr(self, name) for name in ("rows", "dim", "batch", "distribution")}
        model_bytes = self.table_bytes + self.value_bytes + self.state_bytes(rule, storage)
        return {**columns, "model_bytes": model_bytes}


def _grid(*sizes: Iterable[Any], tables: int = 1) -> list[Tables]:
    """Of so many rows, columns and ids."""
    return [Tables(*size)._replace(tables=tables) for size in product(*sizes, DISTRIBUTIONS)]


EMBEDDING_SUITES: dict[str, Callable[[], list[Tables]]] = {
    "embeddings": lambda: _grid(
        (10**5, 10**7, 10**8), (16, 128, 512), (10**3, 10**4, 10**5, 10**6)
    ),
    "embeddings-26": lambda: _grid((10**6,), (16, 128, 512), (4096,), tables=26),  # as DLRM has
    "embeddings-small": lambda: _grid((10**5, 10**6), (16, 64), (10**3, 10**5)),
    "embeddings-tiny": lambda: _grid((1000,), (16, 100), (2000,)),  # for `--check` without a GPU
}
