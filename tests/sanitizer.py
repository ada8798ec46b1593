"""Every address that an interpreted kernel loads or stores, checked against the step's tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lab.traffic import Access
from torch import Tensor

from triton_optim import runtime
from triton_optim.gate import Gate
from triton_optim.kernels.chunks import NUMEL, PARAM
from triton_optim.launch import Launch, UpdateLaunch
from triton_optim.table import Copies, Found, Table

Span = tuple[int, int]  # first byte, and the one after the last


class Sanitizer:
    """Kernels load from tables, gradients, parameters and state, and store to the last two.

    And to gradients that they unscale or clip. All of these that a step writes are stored once, or
    none where the step is skipped: a byte that two programs store is a race, and one that none
    stores is forgotten. Addresses are aligned where the variant promises it.
    """

    def __init__(self) -> None:
        self._readable: list[Span] = []  # while a launch runs
        self._writable: list[Span] = []  # while a table is updated
        self._scratch: list[Span] = []  # what launches write for one another
        self._stored: list[Span] = []

    def update(
        self, update: Callable[..., None], table: Table, found: Found, copies: Copies, gate: Gate
    ) -> None:
        """`Table.update`, watched; under capture nothing runs."""
        if runtime.is_capturing(table.device):
            update(table, found, copies, gate)
            return
        replaced = dict(copies)
        self._grads = _spans(replaced.get(i, grad) for i, grad in enumerate(found.grads))
        self._writable = _spans(found.written)
        if gate.grad_scale is not None:
            self._writable = sorted(self._writable + self._grads)
        self._stored = []
        try:
            update(table, found, copies, gate)
            assert sorted(self._stored) == _merged(self._stored), "stored twice"
            happened = table.tables.happened
            skipped = gate.may_skip and happened is not None and not happened[0]
            assert _size(self._stored) == (0 if skipped else _size(self._writable)), "not stored"
        finally:
            self._writable = []

    def launch(self, run: Callable[..., None], launch: Launch, changed: dict[str, Tensor]) -> None:
        """`Launch.run`, watched."""
        arguments = {**launch.arguments, **changed}
        bound = _spans(value for value in arguments.values() if isinstance(value, Tensor))
        if not isinstance(launch, UpdateLaunch):
            grads = _listed(arguments)
            self._scratch = _merged([*bound, *grads])
            self._readable = _merged([*bound, *grads])
        elif not self._writable:  # a test's own launch
            run(launch, **changed)
            return
        else:
            _check_alignment(launch)
            happened = launch.tables.happened
            self._scratch = _spans([happened] if happened is not None else [])
            self._readable = _merged([*bound, *self._grads, *self._writable])
        try:
            run(launch, **changed)
        finally:
            self._readable = []

    def watch(self, access: Access) -> None:
        if not self._readable or not access.addresses.size:
            return
        start = int(access.addresses.min())
        stop = int(access.addresses.max()) + access.element_size
        if access.stores:
            assert stop - start == access.n_bytes
            if _inside(self._scratch, start, stop):
                return
            self._stored.append((start, stop))
        spans = self._writable if access.stores else self._readable
        assert _inside(spans, start, stop), f"{start:#x} to {stop:#x} is out of bounds"


def _check_alignment(launch: UpdateLaunch) -> None:
    tables = launch.tables
    if launch.variant.aligned:
        tensors = launch.owners.unique()
        promised = torch.cat([tables.rows[tensors, PARAM.value :].flatten(), tables.grads[tensors]])
        assert not bool((promised % runtime.ALIGNMENT).any()), "not aligned"


def _listed(arguments: dict[str, Any]) -> list[Span]:
    """The gradients of a launch over gradients alone."""
    size = arguments["DTYPE"].primitive_bitwidth // 8
    owners = arguments["owners_ptr"].unique()
    numels = arguments["rows_ptr"][owners, NUMEL.value].tolist()
    starts = arguments["grads_ptr"][owners].tolist()
    return [(start, start + size * n) for start, n in zip(starts, numels, strict=True)]


def _inside(spans: list[Span], start: int, stop: int) -> bool:
    place = bisect_right(spans, (start, 1 << 64)) - 1
    return place >= 0 and spans[place][0] <= start and stop <= spans[place][1]


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
