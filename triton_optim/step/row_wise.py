"""Tensors that are updated row by row: the rows of a sparse gradient, or all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..launch import row_chunking, row_launcher
from ..launch.chunking import PlannedParam
from ..launch.launcher import checked_grid
from ..launch.pointer_tables import addresses_of, column, grad_addresses_of, is_aligned
from ..launch.row_launcher import (
    GRAD_COLUMNS,
    MAX_NNZ,
    KeysLaunch,
    RowLaunch,
    RowVariant,
    address_of,
    kind_of,
)
from ..rule import State
from ..tensors.layout import Layout, LayoutGuard, is_contiguous_resolved
from .conditions import StepConditions
from .launch_group import LaunchGroup
from .state import counters_of
from .step_tensors import CurrentTensors, GradCopies, StepTensors, present_of
from .validation import check_indices
from .view import OptimizerView


class RowWiseLaunchGroup(LaunchGroup):
    """Parameters with sparse gradients, and those whose state has one number a row.

    A step makes a key of every row that has a gradient, sorts the keys of all parameters together,
    and updates rows in one launch a variant.
    """

    _grad_columns = GRAD_COLUMNS

    def __init__(
        self,
        view: OptimizerView,
        device: torch.device,
        planned: Sequence[PlannedParam],
        n_hypers: int,
    ) -> None:
        members = row_chunking.grouped(view.rule, view.state, planned)
        planned = [*chain.from_iterable(members.values())]
        self._members = members
        self._wheres = [item.where for item in planned]
        self._shapes = [row_launcher.rows_and_width(item.param) for item in planned]
        self._grad_kinds = [item.signature.kind for item in planned]
        self._n_sparse = sum(len(members[variant]) for variant in members if variant.sparse)
        self._keys: KeysLaunch | None = None
        # Of each launch of this step: how many programs, and what it is given besides.
        self._work: list[tuple[int, dict[str, Tensor | int]]] = []
        super().__init__(view, device, planned, n_hypers)

    def _reads_step(self, planned: Iterable[PlannedParam]) -> bool:
        return any(variant.reads_step for variant in self._members)

    def _tensors(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], states: Sequence[State]
    ) -> StepTensors:
        sparse, dense = grads[: self._n_sparse], grads[self._n_sparse :]
        none = torch.empty((1, 0), dtype=torch.int64, device=self.device)
        ids = [none if grad is None else grad._indices().contiguous() for grad in sparse]
        values = [*(grad if grad is None else grad._values() for grad in sparse), *dense]
        written = [*params, *self._holders.values(states)]
        steps = counters_of(self._rule, states)
        return StepTensors(values, self._all, params, written, (), steps, ids)

    def _layout_guard(self, planned: Sequence[PlannedParam], tensors: StepTensors) -> LayoutGuard:
        n = len(planned)  # the first places are those of gradients, of which the kind is compared
        looks = [item.signature.param for item in planned if item.signature.param is not None]
        layouts = [*looks, *map(Layout.of, tensors.written[n:])]
        return LayoutGuard(layouts, [[i - n for i in row[1:]] for row in self._holders.rows])

    def _chunk(self, planned: Sequence[PlannedParam], states: Sequence[State]) -> Tensor:
        chunked = row_chunking.chunk_rows(self._members, states)
        del self._members
        self._cuts, self._key_dtype = chunked.launches, chunked.key_dtype
        return chunked.tensors

    def read(self, current: CurrentTensors) -> StepTensors | None:
        """See `LaunchGroup`.

        Raises:
            RuntimeError: on the CPU, a gradient has rows that its parameter has not.
        """
        try:
            params, states = self._mine(current)
            grads = [param.grad for param in params]
            if any(
                g is not None and kind_of(g) != k
                for g, k in zip(grads, self._grad_kinds, strict=True)
            ):
                return None
            tensors = self._tensors(grads, params, states)
            written, present = tensors.written, present_of(grads)
            if not (self._guard.check(written) or self._guard.check_rows(written, present)):
                return None
            if addresses_of([*written, *tensors.steps]) != self._addresses:
                return None
        # State was removed, or a step is no tensor any more.
        except (IndexError, KeyError, TypeError):
            return None
        for variant, mine in self._cuts:
            values = tensors.grads[mine.start : mine.stop]
            if variant.multiple > 1 and not is_aligned(map(address_of, values)):
                return None
        for ids, param, where in zip(tensors.ids, params, self._wheres, strict=False):
            check_indices(ids, param.shape, where)
        return self._of_present(tensors, present)

    def _compile(self, enabled: frozenset[str]) -> list[RowLaunch]:
        if self._n_sparse and self._keys is None:
            self._keys = KeysLaunch(self.tables, self._key_dtype)
        self._compile_counts(enabled, self.tables)
        cuts = ((v._replace(conditions=enabled), tensors) for v, tensors in self._cuts)
        return [RowLaunch(self._rule, v, self.tables, mine, self._key_dtype) for v, mine in cuts]

    def grads_to_copy(self, tensors: StepTensors) -> list[tuple[int, Tensor]]:
        return [
            (i, values)
            for i, values in enumerate(tensors.grads)
            if values is not None and not is_contiguous_resolved(values)
        ]

    def upload(
        self, tensors: StepTensors, hypers: list[float | Tensor], max_norm: float | None
    ) -> GradCopies:
        values, copies = [*tensors.grads], []
        for i, grad in self.grads_to_copy(tensors):
            copy = torch.empty(grad.shape, dtype=grad.dtype, device=self.device).copy_(grad)
            values[i] = copy
            copies.append((i, copy))
        counts = self._row_counts(tensors)
        first: list[int] = []
        sizes = []
        for variant, mine in self._cuts:
            own = counts[mine.start : mine.stop]
            chunk = row_launcher.config(variant, self.device).chunk(sum(own))
            programs = [-(-count // chunk) for count in own]
            first += accumulate(programs[:-1], initial=0)
            n_programs, *_ = checked_grid(sum(programs), 1)
            sizes.append((n_programs, chunk))
        positions = accumulate(counts, initial=0)
        ids = [*addresses_of(tensors.ids), *[0] * (len(counts) - self._n_sparse)]
        rows = zip(counts, first, positions, ids, grad_addresses_of(values), strict=False)
        grads = column("q", [*chain.from_iterable(rows)])
        self._buffer.send(grads, hypers, 0.0, self._counting.to_send(tensors.steps, hypers))
        keys = self._sorted_keys(counts[: self._n_sparse])
        self._work = []
        for (variant, _), (n_programs, chunk) in zip(self._cuts, sizes, strict=True):
            scratch = self._scratch(variant, n_programs) if variant.sparse else {}
            self._work.append(
                (n_programs, {"chunk": chunk, **(keys if scratch else {}), **scratch})
            )
        return copies

    def _row_counts(self, tensors: StepTensors) -> list[int]:
        """How many rows of each gradient there are to update from."""
        dense = zip(self._shapes, tensors.present, strict=True)
        of_dense = [rows * here for (rows, _), here in dense][self._n_sparse :]
        n_rows = [*(ids.shape[1] for ids in tensors.ids), *of_dense]
        return [n if width else 0 for n, (_, width) in zip(n_rows, self._shapes, strict=True)]

    def _sorted_keys(self, counts: Sequence[int]) -> dict[str, Tensor | int]:
        """Of all rows of sparse gradients, and where each was; nothing of the optimizer's.

        Raises:
            RuntimeError: there are too many of them.
        """
        total = sum(counts)
        if total == 0:
            return {}
        if total > MAX_NNZ:
            raise RuntimeError(
                f"the sparse gradients of one step have {total} rows together, more than "
                f"{MAX_NNZ}; coalesce() them, or step parameters in several optimizers"
            )
        assert self._keys is not None
        keys = torch.empty(total, dtype=self._key_dtype, device=self.device)
        self._keys.grid = checked_grid(-(-max(counts) // row_launcher.KEYS_BLOCK), len(counts))
        self._keys.run(keys_ptr=keys)
        keys, order = torch.sort(keys, stable=True)
        return {"keys_ptr": keys, "permutation_ptr": order}

    def _scratch(self, variant: RowVariant, n_programs: int) -> dict[str, Tensor | int]:
        """Where programs meet that share a row."""
        shape = (n_programs, 2, variant.columns)
        partials = torch.empty(shape, dtype=variant.compute_dtype, device=self.device)
        tickets = torch.zeros(n_programs, dtype=torch.int32, device=self.device)
        return {"partials_ptr": partials, "arrival_counts_ptr": tickets}

    def _launch(self, scalars: Mapping[str, Tensor], conditions: StepConditions) -> bool:
        work, self._work = self._work, []
        for launch, (n_programs, arguments) in zip(
            self._launches[conditions.enabled], work, strict=True
        ):
            if n_programs:
                launch.grid = (n_programs, 1, 1)
                launch.run(**arguments, **scalars)
        return any(n_programs for n_programs, _ in work)

    def catch_up(self, hypers: list[float | Tensor]) -> None:
        """Launch once without counting a step, for flags that leave parameters alone."""
        self.compile(frozenset())
        self.upload(self.first_inputs, hypers, None)
        self._counting.read(self.first_inputs.steps)
        self._launch({}, StepConditions())
        increment_version(self.first_inputs.written[len(self.first_inputs.shards) :])
