"""The ids of a batch of embeddings: uniform, or few of them frequent."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from lab.embedding_tables import UNIFORM, Tables

ZIPF_EXPONENT = 1.05  # the row of rank k has a share of k**-1.05
GOLDEN = 0.618  # spreads multiples evenly


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
