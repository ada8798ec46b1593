"""Sectors of 32 bytes that warps touch, per request, as a GPU's memory moves them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .access import Access
from .lanes import WARP

SECTOR = 32  # bytes


class Requests(NamedTuple):
    """Of a warp each."""

    number: int = 0
    sectors: int = 0  # that they touch
    least: int = 0  # that hold as many bytes

    def __add__(self, other: Requests) -> Requests:  # type: ignore[override]
        return Requests(*(a + b for a, b in zip(self, other, strict=True)))


def requests_of(access: Access) -> Requests:
    """No access of a thread crosses the border of a sector, being aligned."""
    warps = access.threads.astype(np.uint64) // np.uint64(WARP)
    places = np.unique(np.stack([warps, access.addresses]), axis=1)
    touched = np.unique(np.stack([places[0], places[1] // np.uint64(SECTOR)]), axis=1)
    _, n_places = np.unique(places[0], return_counts=True)
    least = -(-n_places * access.size // SECTOR)
    return Requests(len(n_places), touched.shape[1], int(least.sum()))


def total(accesses: Iterable[Access]) -> Requests:
    return sum(map(requests_of, accesses), Requests())
