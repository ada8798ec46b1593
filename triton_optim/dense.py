"""Tensors that are updated whole: every element has a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import columns, cuts, runtime
from .buffer import Buffer
from .columns import addresses_of, alignment, column
from .cuts import Entry
from .gate import Gate
from .launch import UpdateLaunch
from .layout import LayoutGuard
from .norm import GradNorm
from .shards import bring_grad, is_dtensor, local_of, same_sharding, spec_of
from .states import get_step, holders_of, values_of
from .table import Copies, Found, Table

if TYPE_CHECKING:
    from .fused import FusedStep


class DenseTable(Table):
    """Parameters whose gradients are dense.

    Args:
        optimizer: its hyperparameters are as many as `hypers`.
        device: where its parameters are.
        entries: the parameters; DTensors all of them, or none.
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
        reads_step = any(not e.flags.isdisjoint(optimizer._step_flags) for e in entries)
        super().__init__(
            optimizer, device, entries, reads_step=reads_step, counts_on_device=counts_on_device
        )
        self._rule, complete = optimizer._rule, self._complete
        self._specs = [spec_of(param) for param in self._params if is_dtensor(param)]
        self._reordered = [i for i, entry in enumerate(entries) if entry.reordered]
        grads = [entry.grad for entry in entries]
        found = self._found(grads, [*self._params, *values_of(holders_of(entries, complete))])
        steps = [*map(get_step, complete)] if optimizer._counts_steps else []
        self.first = found
        self._guard = LayoutGuard([*grads, *found.written])
        self._addresses = addresses_of([*found.written, *steps])
        self._grads = addresses_of(grads)
        self._grad_column = column("q", self._grads)
        self._alignment = alignment(self._grad_column)
        cut = cuts.cut(optimizer, entries, complete)
        self._cuts = [c._replace(owners=columns.on_device(c.owners, device)) for c in cut.updates]
        self._grad_cuts = cut.grads
        buffer = Buffer(device, len(entries), hypers, self._pack, reads_steps=reads_step)
        self._buffer = buffer
        self.tables = runtime.Tables(
            rows=columns.on_device(cut.rows, device),
            grads=buffer.grads,
            hypers=buffer.hypers.view(len(optimizer.param_groups), -1),
            steps=buffer.steps,
            max_norm=buffer.max_norm,
        )
        self._launches: dict[frozenset[str], list[UpdateLaunch]] = {}
        self._norms: dict[frozenset[str], GradNorm] = {}

    def _found(self, grads: list[Tensor], written: list[Tensor]) -> Found:
        if not self._specs:
            return Found(grads, written, [])
        return Found(grads, [*map(local_of, written)], written)

    def prepare(self, kinds: frozenset[str]) -> None:
        if kinds in self._launches:
            return
        tables, norm = self.tables, None
        if kinds:
            tables = tables._replace(happened=self._tell_here())
        if "CLIP" in kinds:
            scaled = tables.happened if "UNSCALE" in kinds else None
            norm = GradNorm(self._grad_cuts, tables.rows, tables.grads, scaled)
        self.tables = tables
        launches = [
            UpdateLaunch(
                self._rule,
                cut.variant._replace(gate=kinds),
                cut.config,
                cut.owners,
                tables if norm is None else tables._replace(norm=norm.norm),
                cut.n_bytes,
            )
            for cut in self._cuts
        ]
        if norm is not None:
            self._norms[kinds] = norm
        self._launches[kinds] = launches

    def find(self) -> Found | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, everything has the layout that it
        had, and gradients the alignment.
        """
        grads: list[Tensor | None] = [param.grad for param in self._params]
        try:
            if self._specs:
                grads = self._shards(grads)
            found = self._found(grads, [*self._params, *values_of(self._holders)])  # type: ignore[arg-type]
            if not self._guard.check([*grads, *found.written]):
                return None
            steps = map(get_step, self._counted)
            if addresses_of([*found.written, *steps]) != self._addresses:
                return None
        # State was removed, a step is no tensor any more, or what was a DTensor is none.
        except (KeyError, TypeError, AttributeError):
            return None
        addresses = addresses_of(grads)
        if addresses != self._grads:
            grad_column = column("q", addresses)
            if alignment(grad_column) != self._alignment:
                return None
            self._grads, self._grad_column = addresses, grad_column
        return found

    def _shards(self, grads: list[Any]) -> list[Tensor | None]:
        """Of gradients that lie on their ranks as the parameters do; None for any other."""
        specs = [*map(spec_of, grads)]
        if any(map(is_not, specs, self._specs)):
            for param in self._params:
                bring_grad(param)
            grads = [param.grad for param in self._params]
            return [
                local_of(grad) if same_sharding(spec_of(grad), spec) else None
                for grad, spec in zip(grads, self._specs, strict=True)
            ]
        return [*map(local_of, grads)]

    def reordered(self, found: Found) -> list[Tensor]:
        return [found.grads[i] for i in self._reordered]

    def send(self, found: Found, hypers: list[float | Tensor], max_norm: float | None) -> Copies:
        copies = [
            (i, torch.empty_like(found.written[i], dtype=grad.dtype).copy_(grad))
            for i, grad in ((i, found.grads[i]) for i in self._reordered)
        ]
        grad_column = self._grad_column
        if copies:
            addresses = list(self._grads)
            for i, copy in copies:
                addresses[i] = copy.data_ptr()
            grad_column = column("q", addresses)
        self._buffer.send(grad_column, hypers, max_norm or 0.0)
        return copies

    def sum_squares(self, gate: Gate) -> GradNorm:
        """Launch the norm of the gradients."""
        norm = self._norms[gate.kinds]
        norm.run(gate.on(self.device))
        return norm

    def _launch(self, gate: Gate) -> bool:
        changed = gate.on(self.device) if gate.kinds else {}
        launches = self._launches[gate.kinds]
        for launch in launches:
            launch.run(**changed)
        return bool(launches)

    def _happens(self, gate: Gate) -> Tensor:
        go = super()._happens(gate)
        return go & self._norms[gate.kinds].norm.isfinite() if gate.skip_nonfinite else go

    def _own_tensors(self) -> list[Tensor | None]:
        norms = chain.from_iterable(norm.tensors for norm in self._norms.values())
        owners = (cut.owners for cut in self._cuts)
        return [self._buffer.memory, self.tables.rows, self.tables.steps, *norms, *owners]
