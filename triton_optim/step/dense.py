"""Tensors that are updated whole: every element has a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, is_not

import torch
from torch import Tensor

from ..launch import backend, chunking
from ..launch.chunking import PlannedParam
from ..launch.device_buffer import Buffer
from ..launch.launcher import UpdateLaunch
from ..launch.pointer_tables import (
    NOWHERE,
    addresses_of,
    alignment,
    column,
    grad_addresses_of,
    on_device,
)
from ..rule import State
from ..tensors.layout import Layout, LayoutGuard
from ..tensors.sharding import is_dtensor, local_of, redistribute_grad, same_sharding, spec_of
from .conditions import StepConditions
from .grad_norm import GradNorm
from .launch_group import CurrentTensors, GradCopies, LaunchGroup, StepTensors, present_of
from .state import get_step
from .view import OptimizerView

_grad_of = attrgetter("grad")


class DenseLaunchGroup(LaunchGroup):
    """Parameters whose gradients are dense.

    Args:
        view: of the optimizer.
        device: where its parameters are.
        entries: the parameters; DTensors all of them, or none.
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
        reads_step = any(view.rule.reads_step_under(entry.flags) for entry in entries)
        super().__init__(
            view, device, entries, reads_step=reads_step, counts_on_device=counts_on_device
        )
        self._rule, complete = view.rule, self._complete
        self._specs = [spec_of(entry.param) for entry in entries if is_dtensor(entry.param)]
        self._reordered = [i for i, entry in enumerate(entries) if entry.reordered]
        found = self._first_found(entries)
        grads, state = [entry.signature.grad for entry in entries], found.written[len(entries) :]
        layouts = [*grads, *(entry.signature.param for entry in entries), *map(Layout.of, state)]
        self._guard = LayoutGuard([x for x in layouts if x is not None], self._holders.rows)
        self._has_empty = not all(shard.numel() for shard in found.shards)
        self._alignment = alignment(column("q", [not e.signature.is_aligned for e in entries]))
        self._keep_grads(grad_addresses_of(found.grads))
        cut = chunking.chunk_tensors(view.rule, entries, complete)
        self._cuts = [c._replace(owners=on_device(c.owners, device)) for c in cut.updates]
        self._grad_cuts = cut.grads
        buffer = Buffer(device, len(entries), len(hypers), self._n_steps_sent)
        self._buffer = buffer
        self.tables = backend.Tables(
            rows=on_device(cut.rows, device),
            grads=buffer.grads,
            hypers=buffer.hypers.view(len(view.groups), -1),
            steps=self._steps_read(buffer),
            max_norm=buffer.max_norm,
        )
        self._launches: dict[frozenset[str], list[UpdateLaunch]] = {}
        self._norms: dict[frozenset[str], GradNorm] = {}

    def _found(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], states: Sequence[State]
    ) -> StepTensors:
        """As if all gradients were there."""
        written = [*params, *self._holders.values(states)]
        steps = [*map(get_step, states)] if self._counts_steps else []
        if not self._specs:
            return StepTensors(grads, self._all, params, written, (), steps)
        shards = [*map(local_of, written)]
        return StepTensors(grads, self._all, shards[: len(params)], shards, written, steps)

    def read(self, current: CurrentTensors) -> StepTensors | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, everything has the layout that it
        had, and gradients the alignment, but for those that are missing.
        """
        try:
            mine = self._mine(current)
            if mine is None:
                return None
            params, states = mine
            grads: Sequence[Tensor | None] = [*map(_grad_of, params)]
            if self._specs:
                grads = self._shards(params, grads)
            found = self._found(grads, params, states)
            tensors = [*grads, *found.written]
            complete = self._guard.check(tensors)
            present = self._all if complete else present_of(grads)
            if not complete and not self._guard.check_rows(tensors, present):
                return None
            if addresses_of([*found.written, *found.steps]) != self._addresses:
                return None
        # State was removed, a step is no tensor any more, or what was a DTensor is none.
        except (IndexError, KeyError, TypeError, AttributeError):
            return None
        found = found if complete else self._of_present(found, present)
        some_at_zero = self._has_empty or not complete
        addresses = (grad_addresses_of if some_at_zero else addresses_of)(grads)
        if addresses != self._grads and not self._keep_grads(addresses):
            return None
        return found

    def _keep_grads(self, addresses: list[int]) -> bool:
        """False where one has not the alignment for which its kernel was compiled."""
        grad_column = column("q", addresses)
        aligned = alignment(grad_column)
        if aligned != self._alignment and any(
            address and is_aligned != was_aligned
            for address, is_aligned, was_aligned in zip(
                addresses, aligned, self._alignment, strict=False
            )
        ):
            return False
        self._grads, self._grad_column = addresses, grad_column
        return True

    def _shards(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Of gradients that lie on their ranks as the parameters do; None of one that is missing.

        Raises:
            AttributeError: one is of another kind.
        """
        complete = not any(map(is_, grads, repeat(None)))
        if complete and not any(map(is_not, map(spec_of, grads), self._specs)):
            return [*map(local_of, grads)]
        shards: list[Tensor | None] = []
        for param, grad, spec in zip(params, grads, self._specs, strict=True):
            if grad is not None and spec_of(grad) is not spec:
                redistribute_grad(param)
                grad = param.grad
                if not same_sharding(spec_of(grad), spec):
                    raise AttributeError
            shards.append(None if grad is None else local_of(grad))
        return shards

    def compile(self, enabled: frozenset[str]) -> None:
        if enabled in self._launches:
            return
        tables, norm = self.tables, None
        if enabled:
            tables = tables._replace(step_status=self._tell_here())
        if "CLIP" in enabled:
            scaled = tables.step_status if "UNSCALE" in enabled else None
            norm = GradNorm(self._grad_cuts, tables.rows, tables.grads, scaled)
        self.tables = tables
        launches = [
            UpdateLaunch(
                self._rule,
                cut.variant._replace(conditions=enabled),
                cut.config,
                cut.owners,
                tables if norm is None else tables._replace(norm=norm.norm),
                cut.n_bytes,
            )
            for cut in self._cuts
        ]
        if norm is not None:
            self._norms[enabled] = norm
        told = {
            "found_inf_ptr": tables.step_status,
            "grad_norm_ptr": None if norm is None else norm.norm,
        }
        self._prepare_counts(enabled, tables.grads.view(-1, 1), told)
        self._launches[enabled] = launches

    def grads_to_copy(self, found: StepTensors) -> list[Tensor]:
        return [grad for i in self._reordered if (grad := found.grads[i]) is not None]

    def upload(
        self, found: StepTensors, hypers: list[float | Tensor], max_norm: float | None
    ) -> GradCopies:
        copies = [
            (i, torch.empty_like(found.shards[i], dtype=grad.dtype).copy_(grad))
            for i in self._reordered
            if (grad := found.grads[i]) is not None
        ]
        grad_column = self._grad_column
        if copies:
            addresses = list(self._grads)
            for i, copy in copies:
                addresses[i] = copy.data_ptr() or NOWHERE
            grad_column = column("q", addresses)
        self._buffer.send(grad_column, hypers, max_norm or 0.0, self._steps_to_send(found))
        return copies

    def sum_squares(self, conditions: StepConditions) -> GradNorm:
        """Launch the norm of the gradients."""
        norm = self._norms[conditions.enabled]
        norm.run(conditions.kernel_args(self.device))
        return norm

    def _launch(self, told: Mapping[str, Tensor], conditions: StepConditions) -> bool:
        launches = self._launches[conditions.enabled]
        for launch in launches:
            launch.run(**told)
        return bool(launches)

    def _happens(self, conditions: StepConditions) -> Tensor:
        go = super()._happens(conditions)
        return (
            go & self._norms[conditions.enabled].norm.isfinite()
            if conditions.skip_nonfinite
            else go
        )

    def _own_tensors(self) -> list[Tensor | None]:
        norms = chain.from_iterable(norm.tensors for norm in self._norms.values())
        owners = (cut.owners for cut in self._cuts)
        return [self._buffer.memory, self.tables.rows, *norms, *owners]
