"""Tensors that are updated whole: every element has a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, is_not

import torch
from torch import Tensor

from ..launch.chunking import PlannedParam, chunk_tensors
from ..launch.launcher import UpdateLaunch
from ..launch.pointer_tables import (
    NOWHERE,
    addresses_of,
    alignment,
    column,
    grad_addresses_of,
)
from ..rule import State
from ..tensors.layout import Layout, LayoutGuard
from ..tensors.sharding import is_dtensor, local_of, redistribute_grad, same_sharding, spec_of
from .conditions import StepConditions
from .grad_norm import GradNorm
from .launch_group import LaunchGroup
from .state import counters_of
from .step_tensors import CurrentTensors, GradCopies, StepTensors, present_of
from .view import OptimizerView

_grad_of = attrgetter("grad")


class DenseLaunchGroup(LaunchGroup):
    """Parameters whose gradients are dense."""

    def __init__(
        self,
        view: OptimizerView,
        device: torch.device,
        planned: Sequence[PlannedParam],
        n_hypers: int,
    ) -> None:
        self._specs = [spec_of(item.param) for item in planned if is_dtensor(item.param)]
        self._reordered = [i for i, item in enumerate(planned) if item.reordered]
        self._alignment = alignment(column("q", [not p.signature.is_aligned for p in planned]))
        self._norms: dict[frozenset[str], GradNorm] = {}
        super().__init__(view, device, planned, n_hypers)
        self._has_empty = not all(shard.numel() for shard in self.first_inputs.shards)
        self._keep_grads(grad_addresses_of(self.first_inputs.grads))

    def _reads_step(self, planned: Iterable[PlannedParam]) -> bool:
        reads = any(self._rule.reads_step_under(item.flags) for item in planned)
        return reads or self._options.may_round

    def _tensors(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], states: Sequence[State]
    ) -> StepTensors:
        written = [*params, *self._holders.values(states)]
        steps = counters_of(self._rule, states)
        shards = [*map(local_of, written)] if self._specs else written
        remainders = [(shards[i], shards[place]) for i, place in self._holders.remainders]
        if not self._specs:
            return StepTensors(grads, self._all, params, written, (), steps, (), remainders)
        params, dtensors = shards[: len(params)], written
        return StepTensors(grads, self._all, params, shards, dtensors, steps, (), remainders)

    def _layout_guard(self, planned: Sequence[PlannedParam], tensors: StepTensors) -> LayoutGuard:
        looks = [*(p.signature.grad for p in planned), *(p.signature.param for p in planned)]
        state = map(Layout.of, tensors.written[len(planned) :])
        return LayoutGuard([*(x for x in looks if x is not None), *state], self._holders.rows)

    def _chunk(self, planned: Sequence[PlannedParam], states: Sequence[State]) -> Tensor:
        chunked = chunk_tensors(self._rule, planned, states, self._options)
        self._updates, self._grad_specs = chunked.updates, chunked.grads
        self._formats = chunked.formats
        return chunked.rows

    def read(self, current: CurrentTensors) -> StepTensors | None:
        try:
            params, states = self._mine(current)
            grads: Sequence[Tensor | None] = [*map(_grad_of, params)]
            if self._specs:
                grads = self._shards(params, grads)
            tensors = self._tensors(grads, params, states)
            watched = [*grads, *tensors.written]
            complete = self._guard.check(watched)
            present = self._all if complete else present_of(grads)
            if not complete and not self._guard.check_rows(watched, present):
                return None
            if addresses_of([*tensors.written, *tensors.steps]) != self._addresses:
                return None
        # State was removed, a step is no tensor any more, or what was a DTensor is none.
        except (IndexError, KeyError, TypeError, AttributeError):
            return None
        tensors = tensors if complete else self._of_present(tensors, present)
        some_at_zero = self._has_empty or not complete
        addresses = (grad_addresses_of if some_at_zero else addresses_of)(grads)
        if addresses != self._grads and not self._keep_grads(addresses):
            return None
        return tensors

    def _keep_grads(self, addresses: list[int]) -> bool:
        """False where one has not the alignment for which its kernel was compiled."""
        grad_column = column("q", addresses)
        aligned = alignment(grad_column)
        if aligned != self._alignment:
            items = zip(addresses, aligned, self._alignment, strict=False)
            if any(address and is_now != was for address, is_now, was in items):
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

    def _compile(self, enabled: frozenset[str]) -> list[UpdateLaunch]:
        tables = self.tables
        if "CLIP" in enabled:
            scaled = tables.step_status if "UNSCALE" in enabled else None
            norm = GradNorm(self._grad_specs, tables.rows, tables.grads, scaled)
            self._norms[enabled], tables = norm, tables._replace(norm=norm.norm)
        self._compile_counts(enabled, tables)
        specs = (s._replace(variant=s.variant._replace(conditions=enabled)) for s in self._updates)
        return [UpdateLaunch(self._rule, spec, tables) for spec in specs]

    def grads_to_copy(self, tensors: StepTensors) -> list[tuple[int, Tensor]]:
        grads = ((i, tensors.grads[i]) for i in self._reordered)
        return [(i, grad) for i, grad in grads if grad is not None]

    def upload(
        self, tensors: StepTensors, hypers: list[float | Tensor], max_norm: float | None
    ) -> GradCopies:
        copies = [
            (i, torch.empty_like(tensors.shards[i], dtype=grad.dtype).copy_(grad))
            for i, grad in self.grads_to_copy(tensors)
        ]
        grad_column = self._grad_column
        if copies:
            addresses = list(self._grads)
            for i, copy in copies:
                addresses[i] = copy.data_ptr() or NOWHERE
            grad_column = column("q", addresses)
        self._buffer.send(
            grad_column, hypers, max_norm or 0.0, self._counting.to_send(tensors.steps, hypers)
        )
        return copies

    def sum_squares(self, conditions: StepConditions) -> GradNorm:
        """Launch the norm of the gradients."""
        norm = self._norms[conditions.enabled]
        norm.run(conditions.kernel_args(self.device))
        return norm

    def _launch(self, scalars: Mapping[str, Tensor], conditions: StepConditions) -> bool:
        launches = self._launches[conditions.enabled]
        for launch in launches:
            launch.run(**scalars)
        return bool(launches)

    def _is_taken(self, conditions: StepConditions) -> Tensor:
        taken = super()._is_taken(conditions)
        if conditions.skip_nonfinite:
            taken = taken & self._norms[conditions.enabled].norm.isfinite()
        return taken

    def _own_tensors(self) -> list[Tensor]:
        norms = chain.from_iterable(norm.tensors for norm in self._norms.values())
        return [*norms, *(spec.block_to_tensor for spec in self._updates)]
