"""Embedding tables: their sizes, and the bytes of their state and of a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lab.rules import Rule

UNIFORM, ZIPF = DISTRIBUTIONS = ("uniform", "zipf")


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


def state_bytes(rule: Rule, shape: Tables) -> int:
    """Of all tables."""
    return len(rule.states) * shape.table_bytes + 4 * rule.row_states * shape.tables * shape.rows


def step_bytes(rule: Rule, shape: Tables, unique_rows: int) -> int:
    """What a step must move.

    Values read once; parameter and state of each touched row read once and written once. Not the
    ids, nor what it takes to sort them.
    """
    row = 4 * shape.dim * (1 + len(rule.states)) + 4 * rule.row_states
    return shape.value_bytes + 2 * unique_rows * row


def _grid(
    rows: tuple[int, ...], dims: tuple[int, ...], batches: tuple[int, ...], tables: int = 1
) -> list[Tables]:
    sizes = product(rows, dims, batches, DISTRIBUTIONS)
    return [Tables(*size, tables) for size in sizes]


EMBEDDING_SUITES: dict[str, Callable[[], list[Tables]]] = {
    "embeddings": lambda: _grid(
        (10**5, 10**7, 10**8), (16, 128, 512), (10**3, 10**4, 10**5, 10**6)
    ),
    "embeddings-26": lambda: _grid((10**6,), (16, 128, 512), (4096,), tables=26),  # as DLRM has
    "embeddings-small": lambda: _grid((10**5, 10**6), (16, 64), (10**3, 10**5)),
    "embeddings-tiny": lambda: _grid((1000,), (16, 100), (2000,)),  # for `--check` without a GPU
}
