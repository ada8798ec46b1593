"""The tensors that the kernels update on one device: found, checked and stepped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_not
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from . import columns, cuts, runtime
from .buffer import Buffer
from .columns import addresses_of, alignment, column
from .cuts import Entry
from .gate import Gate
from .launch import UpdateLaunch
from .layout import LayoutGuard
from .norm import GradNorm
from .shards import bring_grad, is_dtensor, local_of, same_sharding, spec_of
from .states import count_updates, get_step, holders_of, pack_steps, states_of, values_of

if TYPE_CHECKING:
    from .fused import FusedStep


Copies = list[tuple[int, Tensor]]  # what stands in for a gradient, by its index


class Found(NamedTuple):
    """What one step reads and writes, looked up and checked for this step: shards of DTensors."""

    grads: list[Tensor]
    written: list[Tensor]  # parameters and state
    wrappers: list[Tensor]  # the DTensors of `written`


class Table:
    """Everything one device's launches need, made once and kept while the tensors stay.

    It remembers addresses and layouts and holds no state tensor, so that state which is moved away
    frees its memory.

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
        self._rule, self.device = optimizer._rule, device
        self._params = [entry.param for entry in entries]
        self._specs = [spec_of(param) for param in self._params if is_dtensor(param)]
        self._reordered = [i for i, entry in enumerate(entries) if entry.reordered]
        self._states, self._new = states_of(optimizer, entries)
        complete = [{**s, **new} for s, new in zip(self._states, self._new, strict=True)]
        reads_step = any(not e.flags.isdisjoint(optimizer._step_flags) for e in entries)
        self._pack = self._private_pack = None
        if optimizer._counts_steps:
            steps = [*map(get_step, complete)]
            self._pack = pack_steps(steps, device, on_device=counts_on_device)
            for state, new, step in zip(complete, self._new, self._pack.unbind(), strict=True):
                state["step"] = new["step"] = step
        elif reads_step:
            self._pack = self._private_pack = count_updates(self._new, device)
        self._may_have_skipped = False
        self._holders = holders_of(entries, self._states)
        self._counted = self._states if optimizer._counts_steps else []

        grads = [entry.grad for entry in entries]
        found = self._found(grads, [*self._params, *values_of(holders_of(entries, complete))])
        steps = [*map(get_step, complete)] if optimizer._counts_steps else []
        self.first: Found | None = found
        self._guard = LayoutGuard([*grads, *found.written])
        self._addresses = addresses_of([*found.written, *steps])
        self._grads = addresses_of(grads)
        self._grad_column = column("q", self._grads)
        self._alignment = alignment(self._grad_column)
        cut = cuts.cut(optimizer, entries, complete)
        self._cuts = [c._replace(owners=columns.on_device(c.owners, device)) for c in cut.updates]
        self._grad_cuts = cut.grads
        buffer = Buffer(device, len(entries), hypers, self._pack, reads_steps=reads_step)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
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
        """Compile what a step under a gate of these kinds launches. Writes nothing."""
        if kinds in self._launches:
            return
        tables, norm = self.tables, None
        if kinds and tables.happened is None:
            happened = torch.arange(1, -1, -1, dtype=torch.float32, device=self.device)
            tables = tables._replace(happened=happened)
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
        """The gradients that lie in another order than their parameters."""
        return [found.grads[i] for i in self._reordered]

    def check_apart(self, found: Found) -> None:
        """Refuse one gradient of two parameters, which would be unscaled twice.

        Raises:
            RuntimeError: there is one.
        """
        addresses = [a for a, grad in zip(self._grads, found.grads, strict=True) if grad.numel()]
        if len(set(addresses)) != len(addresses):
            raise RuntimeError(
                "two parameters have one gradient tensor, which would be unscaled twice; clone() it"
            )

    def send(self, found: Found, hypers: list[float | Tensor], max_norm: float | None) -> Copies:
        """Bring the tables up to date.

        Returns:
            What the launches read instead of gradients that lie in another order than their
            parameters.
        """
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

    def update(self, found: Found, copies: Copies, gate: Gate) -> None:
        """Launch the updates, one a variant, and count the steps."""
        changed = gate.on(self.device) if gate.kinds else {}
        launches = self._launches[gate.kinds]
        for launch in launches:
            launch.run(**changed)
        if gate.may_skip and not launches:  # a rank without elements counts as the others do
            self._tell_what_happened(gate)
        if self._pack is not None:
            happened = self.tables.happened
            self._pack.add_(happened[0] if gate.may_skip and happened is not None else 1)
        if gate.grad_scale is not None:
            for i, copy in copies:
                found.grads[i].copy_(copy)
            increment_version(found.grads)
        increment_version([*found.written, *found.wrappers])
        self._may_have_skipped |= gate.may_skip
        self._outlive_the_stream()

    def _tell_what_happened(self, gate: Gate) -> None:
        go = torch.ones((), dtype=torch.bool, device=self.device)
        if gate.found_inf is not None:
            go = go & (gate.found_inf == 0).to(self.device, non_blocking=True)
        if gate.skip_nonfinite:
            go = go & self._norms[gate.kinds].norm.isfinite()
        assert self.tables.happened is not None
        self.tables.happened.copy_(torch.stack([go, ~go]))

    def _outlive_the_stream(self) -> None:
        """Keep the tables' memory from reuse until a step on another stream than theirs is done."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            own = (self._buffer.memory, self.tables.rows, self.tables.steps, self.tables.happened)
            norms = chain.from_iterable(norm.tensors for norm in self._norms.values())
            for tensor in (*own, *norms, *(cut.owners for cut in self._cuts)):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def hand_over_state(self, optimizer: FusedStep) -> None:
        """After the first step: give the optimizer the state that it made."""
        self.first = None
        for param, state, new in zip(self._params, self._states, self._new, strict=True):
            if new:
                state.update(new)
                optimizer.state[param] = state
        self._new = []

    def forget_skipped(self, optimizer: Optimizer) -> None:
        """Take back state of which no step has happened yet, if that can be; waits for the device.

        Where the rule must know its first update and state does not tell.
        """
        if self._private_pack is None or not self._may_have_skipped:
            return
        for param, updates in zip(self._params, self._private_pack.tolist(), strict=True):
            if updates == 0:
                optimizer.state.pop(param, None)
        self._may_have_skipped = False
