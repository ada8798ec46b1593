"""Tensors that are updated row by row: the rows of a sparse gradient, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import columns, row_cuts, row_launch, runtime
from .buffer import Buffer
from .checks import check_ids
from .columns import addresses_of, column, is_aligned
from .cuts import Entry
from .gate import Gate
from .layout import LayoutGuard, is_plain
from .row_launch import GRAD_COLUMNS, KeysLaunch, RowLaunch, RowVariant
from .states import get_step, holders_of, values_of
from .table import Copies, Found, Table

if TYPE_CHECKING:
    from .fused import FusedStep


class RowTable(Table):
    """Parameters with sparse gradients, and those whose state has one number a row.

    A step makes a key of every row that has a gradient, sorts the keys of all parameters together,
    and updates rows in one launch a variant.

    Args:
        optimizer: its hyperparameters are as many as `hypers`.
        device: where its parameters are.
        entries: the parameters.
        hypers: every group's hyperparameters, one after another.
        counts_on_device: whether steps are counted on `device`.
    """

    def __init__(
        self,
        optimizer: FusedStep,
        device: torch.device,
        entries: Sequence[Entry],
        hypers: Sequence[object],
        *,
        counts_on_device: bool,
    ) -> None:
        members = row_cuts.grouped(optimizer, entries)
        entries = [*chain.from_iterable(members.values())]
        reads_step = any(variant.reads_step for variant in members)
        super().__init__(
            optimizer, device, entries, reads_step=reads_step, counts_on_device=counts_on_device
        )
        self._rule = optimizer._row_rule or optimizer._rule
        complete = self._complete
        self._wheres = [entry.where for entry in entries]
        self._shapes = [row_launch.rows_and_width(entry.param) for entry in entries]
        self._looks = [_look(entry.grad) for entry in entries]
        self._n_sparse = sum(entry.grad.layout == torch.sparse_coo for entry in entries)
        written = [*self._params, *values_of(holders_of(entries, complete))]
        steps = [*map(get_step, complete)] if optimizer._counts_steps else []
        self._guard = LayoutGuard(written)
        self._addresses = addresses_of([*written, *steps])
        self.first = found = self._found([entry.grad for entry in entries], written)

        cut = row_cuts.cut(members, complete, [*map(_address, found.grads)])
        self._cuts, self._key_dtype = cut.launches, cut.key_dtype
        n_columns = GRAD_COLUMNS * len(entries)
        buffer = Buffer(device, n_columns, hypers, self._pack, reads_steps=reads_step)
        self._buffer = buffer
        self._tables = runtime.Tables(
            rows=columns.on_device(cut.tensors, device),
            grads=buffer.grads,
            hypers=buffer.hypers.view(len(optimizer.param_groups), -1),
            steps=buffer.steps,
        )
        self._keys: KeysLaunch | None = None
        self._launches: dict[frozenset[str], list[RowLaunch]] = {}
        # Of each launch of this step: how many programs, and what it is given besides.
        self._work: list[tuple[int, dict[str, Tensor | int]]] = []

    def _found(self, grads: Sequence[Tensor], written: list[Tensor]) -> Found:
        sparse, dense = grads[: self._n_sparse], grads[self._n_sparse :]
        values = [*(grad._values() for grad in sparse), *dense]
        ids = [grad._indices().contiguous() for grad in sparse]
        return Found(values, written, [], ids)

    def find(self) -> Found | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, and gradients of the same kind.

        Raises:
            RuntimeError: on the CPU, a gradient has rows that its parameter has not.
        """
        grads = [param.grad for param in self._params]
        if [*map(_look, grads)] != self._looks:
            return None
        try:
            written = [*self._params, *values_of(self._holders)]
            if not self._guard.check(written):
                return None
            steps = map(get_step, self._counted)
            if addresses_of([*written, *steps]) != self._addresses:
                return None
        except (KeyError, TypeError):  # state was removed, or a step is no tensor any more
            return None
        found = self._found(grads, written)  # type: ignore[arg-type]
        for variant, tensors in self._cuts:
            values = found.grads[tensors.start : tensors.stop]
            if variant.multiple > 1 and not is_aligned(map(_address, values)):
                return None
        for ids, param, where in zip(found.ids, self._params, self._wheres, strict=False):
            check_ids(ids, param.shape, where)
        return found

    def prepare(self, kinds: frozenset[str]) -> None:
        if kinds in self._launches:
            return
        if kinds:
            self._tables = self._tables._replace(happened=self._tell_here())
        if self._n_sparse and self._keys is None:
            self._keys = KeysLaunch(self._tables, self._key_dtype)
        self._launches[kinds] = [
            RowLaunch(
                self._rule, variant._replace(gate=kinds), self._tables, tensors, self._key_dtype
            )
            for variant, tensors in self._cuts
        ]

    def reordered(self, found: Found) -> list[Tensor]:
        return [values for values in found.grads if not is_plain(values)]

    def send(self, found: Found, hypers: list[float | Tensor], max_norm: float | None) -> Copies:
        copies = [
            (i, torch.empty(values.shape, dtype=values.dtype, device=self.device).copy_(values))
            for i, values in enumerate(found.grads)
            if not is_plain(values)
        ]
        values = [*found.grads]
        for i, copy in copies:
            values[i] = copy
        counts = self._counts(found)
        first: list[int] = []
        sizes = []
        for variant, tensors in self._cuts:
            mine = counts[tensors.start : tensors.stop]
            chunk = row_launch.config(variant, self.device).chunk(sum(mine))
            programs = [-(-count // chunk) for count in mine]
            first += accumulate(programs[:-1], initial=0)
            sizes.append((sum(programs), chunk))
        positions = accumulate(counts, initial=0)
        ids = [*addresses_of(found.ids), *[0] * (len(counts) - self._n_sparse)]
        rows = zip(counts, first, positions, ids, addresses_of(values), strict=False)
        self._buffer.send(column("q", [*chain.from_iterable(rows)]), hypers, 0.0)
        keys = self._sorted_keys(counts[: self._n_sparse])
        self._work = []
        for (variant, _), (n_programs, chunk) in zip(self._cuts, sizes, strict=True):
            scratch = self._scratch(variant, n_programs) if variant.sparse else {}
            self._work.append(
                (n_programs, {"chunk": chunk, **(keys if scratch else {}), **scratch})
            )
        return copies

    def _counts(self, found: Found) -> list[int]:
        """How many rows of each gradient there are to update from."""
        dense = self._shapes[self._n_sparse :]
        n_rows = [*(ids.shape[1] for ids in found.ids), *(rows for rows, _ in dense)]
        return [n if width else 0 for n, (_, width) in zip(n_rows, self._shapes, strict=True)]

    def _sorted_keys(self, counts: Sequence[int]) -> dict[str, Tensor | int]:
        """Of all rows of sparse gradients, and where each was; nothing of the optimizer's.

        Raises:
            RuntimeError: there are too many of them.
        """
        total = sum(counts)
        if total == 0:
            return {}
        if total > row_launch.MAX_COUNT:
            raise RuntimeError(
                f"the sparse gradients of one step have {total} rows together, more than "
                f"{row_launch.MAX_COUNT}; coalesce() them, or step parameters in several optimizers"
            )
        assert self._keys is not None
        keys = torch.empty(total, dtype=self._key_dtype, device=self.device)
        self._keys.grid = (-(-max(counts) // row_launch.KEYS_BLOCK), len(counts), 1)
        self._keys.run(keys_ptr=keys)
        keys, order = torch.sort(keys, stable=True)
        return {"keys_ptr": keys, "order_ptr": order}

    def _scratch(self, variant: RowVariant, n_programs: int) -> dict[str, Tensor | int]:
        """Where programs meet that share a row."""
        shape = (n_programs, 2, variant.columns)
        partials = torch.empty(shape, dtype=variant.compute_dtype, device=self.device)
        tickets = torch.zeros(n_programs, dtype=torch.int32, device=self.device)
        return {"partials_ptr": partials, "tickets_ptr": tickets}

    def _launch(self, gate: Gate) -> bool:
        told = gate.on(self.device) if gate.kinds else {}
        work, self._work = self._work, []
        for launch, (n_programs, arguments) in zip(self._launches[gate.kinds], work, strict=True):
            if n_programs:
                launch.grid = (n_programs, 1, 1)
                launch.run(**arguments, **told)
        return any(n_programs for n_programs, _ in work)

    def catch_up(self, hypers: list[float | Tensor]) -> None:
        """Launch once without counting a step, for flags that leave parameters alone."""
        assert self.first is not None
        self.prepare(frozenset())
        self.send(self.first, hypers, None)
        self._launch(Gate())
        increment_version(self.first.written[len(self._params) :])

    def _own_tensors(self) -> list[Tensor | None]:
        return [self._buffer.memory, self._tables.rows, self._tables.steps]


def _look(grad: Tensor | None) -> object:
    """What must stay as it is while a table is kept."""
    if grad is None:
        return None
    if grad.layout != torch.sparse_coo:
        return type(grad), grad.layout, grad.shape, grad.dtype, grad.device
    kind = (grad.sparse_dim(), row_launch.few_enough(grad))
    return type(grad), grad.layout, grad.shape, grad.dtype, grad.device, kind


def _address(values: Tensor) -> int:
    """0 of what will be copied."""
    return values.data_ptr() if is_plain(values) else 0
