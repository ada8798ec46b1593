"""Every address that an interpreted kernel loads or stores, checked against the step's tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lab.traffic import Access
from torch import Tensor

from triton_optim.kernels.chunks import NUMEL, PARAM
from triton_optim.kernels.keys import COUNT, GRAD_COLUMNS, IDS, ROW_STATE, ROWS, VALUES, WIDTH
from triton_optim.kernels.keys import PARAM as ROW_PARAM
from triton_optim.launch import backend
from triton_optim.launch.launcher import Launch, UpdateLaunch
from triton_optim.launch.row_launcher import KeysLaunch, RowLaunch
from triton_optim.launch.variant import ITEM_SIZES
from triton_optim.step.conditions import StepConditions
from triton_optim.step.launch_group import LaunchGroup
from triton_optim.step.row_wise import RowWiseLaunchGroup
from triton_optim.step.step_tensors import GradCopies, StepTensors

Span = tuple[int, int]  # first byte, and the one after the last


class Sanitizer:
    """Kernels load from tables, gradients, parameters and state, and store to the last two.

    And to gradients that they unscale or clip. Updates by rows do so to the rows that have a
    gradient, and see no other. All of these that a step writes are stored once, or
    none where the step is skipped: a byte that two programs store is a race, and one that none
    stores is forgotten. Addresses are aligned where the variant promises it.
    """

    def __init__(self) -> None:
        self._readable: list[Span] = []  # while a launch runs
        self._writable: list[Span] = []  # while a table is updated
        self._scratch: list[Span] = []  # what launches write for one another
        self._stored: list[Span] = []

    def update(
        self,
        update: Callable[..., None],
        table: LaunchGroup,
        found: StepTensors,
        copies: GradCopies,
        conditions: StepConditions,
    ) -> None:
        """`LaunchGroup.update`, watched; under capture nothing runs."""
        if backend.is_capturing(table.device):
            update(table, found, copies, conditions)
            return
        replaced = dict(copies)
        grads = ((i, grad) for i, grad in enumerate(found.grads) if grad is not None)
        self._grads = _spans(replaced.get(i, grad) for i, grad in grads)
        if isinstance(table, RowWiseLaunchGroup):
            self._writable = touched(table, found)
        else:
            self._writable = _spans(found.written)
        if conditions.grad_scale is not None:
            self._writable = sorted(self._writable + self._grads)
        self._stored = []
        try:
            update(table, found, copies, conditions)
            assert sorted(self._stored) == _merged(self._stored), "stored twice"
            status = table.step_status
            skipped = conditions.may_skip and status is not None and not status[0]
            assert _size(self._stored) == (0 if skipped else _size(self._writable)), "not stored"
        finally:
            self._writable = []

    def launch(self, run: Callable[..., None], launch: Launch, changed: dict[str, Tensor]) -> None:
        """`Launch.run`, watched."""
        if isinstance(launch, UpdateLaunch | RowLaunch) and not self._writable:
            run(launch, **changed)  # a test's own launch, or one that is no step
            return
        arguments = {**launch.arguments, **changed}
        bound = _spans(value for value in arguments.values() if isinstance(value, Tensor))
        if isinstance(launch, KeysLaunch):
            self._scratch = _spans([arguments["keys_ptr"]])
            self._readable = _merged([*bound, *_ids(launch)])
        elif isinstance(launch, RowLaunch):
            scratch = ("partials_ptr", "arrival_counts_ptr", "step_status_ptr")
            self._scratch = _spans(t for name in scratch if (t := arguments[name]) is not None)
            self._readable = _merged([*bound, *self._grads, *self._writable])
            _check_row_alignment(launch)
        elif launch.name == "count_kernel":
            counts = _counts(arguments)
            self._scratch = _merged([*counts, *_spans([arguments["column_ptr"]])])
            self._readable = _merged([*bound, *counts])
        elif not isinstance(launch, UpdateLaunch):
            grads = _listed(arguments)
            self._scratch = _merged([*bound, *grads])
            self._readable = _merged([*bound, *grads])
        else:
            _check_alignment(launch)
            step_status = launch.tables.step_status
            self._scratch = _spans([step_status] if step_status is not None else [])
            self._readable = _merged([*bound, *self._grads, *self._writable])
        try:
            run(launch, **changed)
        finally:
            self._readable = []

    @property
    def spans(self) -> tuple[list[Span], list[Span]] | None:
        """What the launch that runs may load and store to; None where that is not known."""
        if not self._readable:
            return None
        return self._readable + self._scratch, self._scratch + self._writable

    def watch(self, access: Access) -> None:
        if not self._readable or not access.addresses.size:
            return
        for start, stop in _runs(access):
            if access.stores:
                if _inside(self._scratch, start, stop):
                    continue
                self._stored.append((start, stop))
            spans = self._writable if access.stores else self._readable
            assert _inside(spans, start, stop), f"{start:#x} to {stop:#x} is out of bounds"


def touched(table: RowWiseLaunchGroup, found: StepTensors) -> list[Span]:
    """The rows of parameters and state that a step must write, found without the kernels."""
    spans = []
    for variant, tensors in table._cuts:
        sizes = [ITEM_SIZES[variant.param_dtype]]
        sizes += variant.n_states * [ITEM_SIZES[variant.state_dtype]]
        for i in tensors:
            if not found.present[i]:
                continue
            row = table.tables.rows[i].tolist()
            width, n_rows = row[WIDTH.value], row[ROWS.value]
            rows: Iterable[int] = range(n_rows)
            if variant.sparse:
                rows = [r for r in found.ids[i].unique().tolist() if 0 <= r < n_rows]
            addresses = row[ROW_PARAM.value :]
            for address, size in zip(addresses, sizes, strict=False):
                spans += [
                    (address + r * width * size, address + (r + 1) * width * size) for r in rows
                ]
            if variant.row_dtype is not None:
                size = 8 if variant.row_dtype == "float64" else 4
                spans += [(row[-1] + r * size, row[-1] + (r + 1) * size) for r in rows if width]
    return _joined(span for span in spans if span[0] < span[1])


def _joined(spans: Iterable[Span]) -> list[Span]:
    """The same bytes, neighbours in one span."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _runs(access: Access) -> Iterator[Span]:
    """The spans of memory that an access is about; bytes that it has twice are in two."""
    addresses, size = np.sort(access.addresses), access.element_size
    breaks = np.flatnonzero(np.diff(addresses) != size) + 1
    for run in np.split(addresses, breaks):
        yield int(run[0]), int(run[-1]) + size


def _check_alignment(launch: UpdateLaunch) -> None:
    tables = launch.tables
    if launch.variant.aligned:
        tensors = launch.spec.block_to_tensor.unique()
        promised = torch.cat([tables.rows[tensors, PARAM.value :].flatten(), tables.grads[tensors]])
        assert not bool((promised % backend.ALIGNMENT).any()), "not aligned"


def _ids(launch: KeysLaunch) -> list[Span]:
    """The ids of sparse gradients."""
    n = launch.grid[1]
    grads = launch.arguments["grads_ptr"][: GRAD_COLUMNS.value * n].view(n, -1)
    starts, counts = grads[:, IDS.value].tolist(), grads[:, COUNT.value].tolist()
    return [(start, start + 8 * n) for start, n in zip(starts, counts, strict=True)]


def _check_row_alignment(launch: RowLaunch) -> None:
    if launch.variant.multiple > 1:
        first, n = launch.arguments["first_tensor"], launch.arguments["n_tensors"]
        tensors = launch.arguments["tensors_ptr"][first : first + n]
        grads = launch.arguments["grads_ptr"][: GRAD_COLUMNS.value * (first + n)].view(
            first + n, -1
        )
        addresses = [*tensors[:, ROW_PARAM.value : ROW_STATE.value].flatten().tolist()]
        addresses += grads[first:, VALUES.value].tolist()
        assert not any(address % backend.ALIGNMENT for address in addresses), "not aligned"
        assert not bool((tensors[:, WIDTH.value] % launch.variant.multiple).any()), "not aligned"


def _counts(arguments: dict[str, Any]) -> list[Span]:
    """The step counts and other scalars of a launch that counts."""
    n, addresses = arguments["n_tensors"], arguments["steps_ptr"].tolist()
    sizes = [arguments[name].primitive_bitwidth // 8 for name in ("DTYPE", "SCALAR_DTYPE")]
    starts = enumerate(addresses[: n * (1 + arguments["N_SCALARS"])])
    return _joined((start, start + sizes[i >= n]) for i, start in starts)


def _listed(arguments: dict[str, Any]) -> list[Span]:
    """The gradients of a launch over gradients alone."""
    size = arguments["DTYPE"].primitive_bitwidth // 8
    owners = arguments["block_to_tensor_ptr"].unique()
    numels = arguments["tensor_table_ptr"][owners, NUMEL.value].tolist()
    starts = arguments["grads_ptr"][owners].tolist()
    return [(start, start + size * n) for start, n in zip(starts, numels, strict=True)]


def _inside(spans: list[Span], start: int, stop: int) -> bool:
    place = bisect_right(spans, (start, 1 << 64)) - 1
    return place >= 0 and spans[place][0] <= start and stop <= spans[place][1]


def _spans(tensors: Iterable[Tensor | None]) -> list[Span]:
    held = [t for t in tensors if t is not None and t.nbytes]
    return sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in held)


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
