"""Tensors that are updated row by row: the rows of a sparse gradient, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..launch import backend, pointer_tables, row_chunking, row_launcher
from ..launch.chunking import PlannedParam
from ..launch.device_buffer import Buffer
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
from .launch_group import CurrentTensors, GradCopies, LaunchGroup, StepTensors, present_of
from .state import get_step
from .validation import check_indices
from .view import OptimizerView


class RowWiseLaunchGroup(LaunchGroup):
    """Parameters with sparse gradients, and those whose state has one number a row.

    A step makes a key of every row that has a gradient, sorts the keys of all parameters together,
    and updates rows in one launch a variant.

    Args:
        view: of the optimizer.
        device: where its parameters are.
        entries: the parameters.
        hypers: every group's hyperparameters, one after another.
        counts_on_device: whether steps are counted on `device`.
    """

    def __init__(
        self,
        view: OptimizerView,
        device: torch.device,
        entries: Sequence[PlannedParam],
        hypers: Sequence[object],
        *,
        counts_on_device: bool,
    ) -> None:
        members = row_chunking.grouped(view.rule, view.state, entries)
        entries = [*chain.from_iterable(members.values())]
        reads_step = any(variant.reads_step for variant in members)
        super().__init__(
            view, device, entries, reads_step=reads_step, counts_on_device=counts_on_device
        )
        self._rule = view.rule
        complete = self._complete
        self._wheres = [entry.where for entry in entries]
        self._shapes = [row_launcher.rows_and_width(entry.param) for entry in entries]
        self._grad_kinds = [entry.signature.kind for entry in entries]
        self._n_sparse = sum(variant.sparse for variant in members for _ in members[variant])
        found = self._first_found(entries)
        looks = [entry.signature.param for entry in entries if entry.signature.param is not None]
        layouts = [*looks, *map(Layout.of, found.written[len(entries) :])]
        n = len(entries)  # the first places are those of gradients, of which the kind is compared
        self._guard = LayoutGuard(layouts, [[i - n for i in row[1:]] for row in self._holders.rows])
        cut = row_chunking.chunk_rows(members, complete)
        self._cuts, self._key_dtype = cut.launches, cut.key_dtype
        buffer = Buffer(device, GRAD_COLUMNS * n, len(hypers), self._n_steps_sent)
        self._buffer = buffer
        self._tables = backend.Tables(
            rows=pointer_tables.on_device(cut.tensors, device),
            grads=buffer.grads,
            hypers=buffer.hypers.view(len(view.groups), -1),
            steps=self._steps_read(buffer),
        )
        self._keys: KeysLaunch | None = None
        self._launches: dict[frozenset[str], list[RowLaunch]] = {}
        # Of each launch of this step: how many programs, and what it is given besides.
        self._work: list[tuple[int, dict[str, Tensor | int]]] = []

    def _found(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], states: Sequence[State]
    ) -> StepTensors:
        """As if all gradients were there."""
        sparse, dense = grads[: self._n_sparse], grads[self._n_sparse :]
        none = torch.empty((1, 0), dtype=torch.int64, device=self.device)
        ids = [none if grad is None else grad._indices().contiguous() for grad in sparse]
        values = [*(grad if grad is None else grad._values() for grad in sparse), *dense]
        written = [*params, *self._holders.values(states)]
        steps = [*map(get_step, states)] if self._counts_steps else []
        return StepTensors(values, self._all, params, written, (), steps, ids)

    def read(self, current: CurrentTensors) -> StepTensors | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, and gradients of the same kind, but
        for those that are missing.

        Raises:
            RuntimeError: on the CPU, a gradient has rows that its parameter has not.
        """
        try:
            mine = self._mine(current)
            if mine is None:
                return None
            params, states = mine
            grads = [param.grad for param in params]
            if any(
                g is not None and kind_of(g) != k
                for g, k in zip(grads, self._grad_kinds, strict=True)
            ):
                return None
            found = self._found(grads, params, states)
            written, present = found.written, present_of(grads)
            if not (self._guard.check(written) or self._guard.check_rows(written, present)):
                return None
            if addresses_of([*written, *found.steps]) != self._addresses:
                return None
        # State was removed, or a step is no tensor any more.
        except (IndexError, KeyError, TypeError):
            return None
        for variant, tensors in self._cuts:
            values = found.grads[tensors.start : tensors.stop]
            if variant.multiple > 1 and not is_aligned(map(address_of, values)):
                return None
        for ids, param, where in zip(found.ids, params, self._wheres, strict=False):
            check_indices(ids, param.shape, where)
        return self._of_present(found, present)

    def compile(self, enabled: frozenset[str]) -> None:
        if enabled in self._launches:
            return
        if enabled:
            self._tables = self._tables._replace(step_status=self._tell_here())
        if self._n_sparse and self._keys is None:
            self._keys = KeysLaunch(self._tables, self._key_dtype)
        self._launches[enabled] = [
            RowLaunch(
                self._rule,
                variant._replace(conditions=enabled),
                self._tables,
                tensors,
                self._key_dtype,
            )
            for variant, tensors in self._cuts
        ]
        grads = self._tables.grads[: GRAD_COLUMNS * len(self._all)].view(-1, GRAD_COLUMNS)
        told = {"found_inf_ptr": self._tables.step_status, "grad_norm_ptr": None}
        self._prepare_counts(enabled, grads, told)

    def grads_to_copy(self, found: StepTensors) -> list[Tensor]:
        return [
            values
            for values in found.grads
            if values is not None and not is_contiguous_resolved(values)
        ]

    def upload(
        self, found: StepTensors, hypers: list[float | Tensor], max_norm: float | None
    ) -> GradCopies:
        copies = [
            (i, torch.empty(values.shape, dtype=values.dtype, device=self.device).copy_(values))
            for i, values in enumerate(found.grads)
            if values is not None and not is_contiguous_resolved(values)
        ]
        values = [*found.grads]
        for i, copy in copies:
            values[i] = copy
        counts = self._row_counts(found)
        first: list[int] = []
        sizes = []
        for variant, tensors in self._cuts:
            mine = counts[tensors.start : tensors.stop]
            chunk = row_launcher.config(variant, self.device).chunk(sum(mine))
            programs = [-(-count // chunk) for count in mine]
            first += accumulate(programs[:-1], initial=0)
            n_programs, *_ = checked_grid(sum(programs), 1)
            sizes.append((n_programs, chunk))
        positions = accumulate(counts, initial=0)
        ids = [*addresses_of(found.ids), *[0] * (len(counts) - self._n_sparse)]
        rows = zip(counts, first, positions, ids, grad_addresses_of(values), strict=False)
        grads = column("q", [*chain.from_iterable(rows)])
        self._buffer.send(grads, hypers, 0.0, self._steps_to_send(found))
        keys = self._sorted_keys(counts[: self._n_sparse])
        self._work = []
        for (variant, _), (n_programs, chunk) in zip(self._cuts, sizes, strict=True):
            scratch = self._scratch(variant, n_programs) if variant.sparse else {}
            self._work.append(
                (n_programs, {"chunk": chunk, **(keys if scratch else {}), **scratch})
            )
        return copies

    def _row_counts(self, found: StepTensors) -> list[int]:
        """How many rows of each gradient there are to update from."""
        dense = zip(self._shapes, found.present, strict=True)
        of_dense = [rows * here for (rows, _), here in dense][self._n_sparse :]
        n_rows = [*(ids.shape[1] for ids in found.ids), *of_dense]
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
        self._keys.grid = (-(-max(counts) // row_launcher.KEYS_BLOCK), len(counts), 1)
        self._keys.run(keys_ptr=keys)
        keys, order = torch.sort(keys, stable=True)
        return {"keys_ptr": keys, "permutation_ptr": order}

    def _scratch(self, variant: RowVariant, n_programs: int) -> dict[str, Tensor | int]:
        """Where programs meet that share a row."""
        shape = (n_programs, 2, variant.columns)
        partials = torch.empty(shape, dtype=variant.compute_dtype, device=self.device)
        tickets = torch.zeros(n_programs, dtype=torch.int32, device=self.device)
        return {"partials_ptr": partials, "arrival_counts_ptr": tickets}

    def _launch(self, told: Mapping[str, Tensor], conditions: StepConditions) -> bool:
        work, self._work = self._work, []
        for launch, (n_programs, arguments) in zip(
            self._launches[conditions.enabled], work, strict=True
        ):
            if n_programs:
                launch.grid = (n_programs, 1, 1)
                launch.run(**arguments, **told)
        return any(n_programs for n_programs, _ in work)

    def catch_up(self, hypers: list[float | Tensor]) -> None:
        """Launch once without counting a step, for flags that leave parameters alone."""
        self.compile(frozenset())
        self.upload(self.first_inputs, hypers, None)
        if self._device_counts is not None:
            self._device_counts.read(self.first_inputs.steps)
        self._launch({}, StepConditions())
        increment_version(self.first_inputs.written[len(self.first_inputs.shards) :])

    def _own_tensors(self) -> list[Tensor | None]:
        return [self._buffer.memory, self._tables.rows]
