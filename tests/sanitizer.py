"""Every address that an interpreted kernel loads or stores, checked against the step's tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lab.traffic import Access
from torch import Tensor

from triton_optim import runtime
from triton_optim.kernels.multi_tensor import PARAM
from triton_optim.table import Found, Table

Span = tuple[int, int]  # first byte, and the one after the last


class Sanitizer:
    """Kernels load from tables, gradients, parameters and state, and store to the last two.

    All of these that a step writes are stored once: a byte that two programs store is a race, and
    one that none stores is forgotten. Addresses are aligned where the variant promises it.
    """

    def __init__(self) -> None:
        self._readable: list[Span] = []  # while a launch runs
        self._writable: list[Span] = []  # while a table is run
        self._stored: list[Span] = []

    def run(self, run: Callable[..., None], table: Table, found: Found, hypers: Any) -> None:
        """`Table.run`, watched."""
        self._writable = _spans(found.written)
        self._grads = _spans(found.grads)
        self._copied = [(i, found.grads[i].nbytes) for i in table._reordered]
        self._stored = []
        try:
            run(table, found, hypers)
            assert sorted(self._stored) == _merged(self._stored), "stored twice"
            assert _size(self._stored) == _size(self._writable), "not stored"
        finally:
            self._writable = []

    def launch(self, run: Callable[[runtime.Launch], None], launch: runtime.Launch) -> None:
        """`Launch.run`, watched."""
        if not self._writable:  # a test's own launch
            run(launch)
            return
        variant, owners, tables = launch.variant, launch.owners, launch.tables
        addresses = tables.grads.tolist()
        if variant.aligned:
            tensors = owners.unique()
            promised = torch.cat(
                [tables.rows[tensors, PARAM.value :].flatten(), tables.grads[tensors]]
            )
            assert not bool((promised % runtime.ALIGNMENT).any()), "not aligned"
        copies = [(addresses[i], addresses[i] + size) for i, size in self._copied]
        read = _spans([owners, *(t for t in tables if t is not None)])
        self._readable = _merged([*read, *copies, *self._grads, *self._writable])
        try:
            run(launch)
        finally:
            self._readable = []

    def watch(self, access: Access) -> None:
        if not self._readable or not access.addresses.size:
            return
        start = int(access.addresses.min())
        stop = int(access.addresses.max()) + access.element_size
        if access.stores:
            assert stop - start == access.n_bytes
            self._stored.append((start, stop))
        spans = self._writable if access.stores else self._readable
        first, last = spans[bisect_right(spans, (start, 1 << 64)) - 1]
        assert first <= start and stop <= last, f"{start:#x} to {stop:#x} is out of bounds"


def _spans(tensors: Iterable[Tensor]) -> list[Span]:
    return sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes)


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The same bytes as spans that do not overlap; neighbours stay apart."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _size(spans: Iterable[Span]) -> int:
    return sum(stop - start for start, stop in spans)
