"""The tensors that the kernels update on one device: their state, and a step of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from .cuts import Entry
from .gate import Gate
from .states import count_updates, get_step, holders_of, pack_steps, states_of

if TYPE_CHECKING:
    from .fused import FusedStep


Copies = list[tuple[int, Tensor]]  # what stands in for a gradient, by its index


class Found(NamedTuple):
    """What one step reads and writes, looked up and checked for this step: shards of DTensors."""

    grads: list[Tensor]  # of sparse ones, the values
    written: list[Tensor]  # parameters and state
    wrappers: list[Tensor]  # the DTensors of `written`
    ids: Sequence[Tensor] = ()  # int64 [1, rows], of sparse gradients


class Table:
    """Everything one device's launches need, made once and kept while the tensors stay.

    It remembers addresses and layouts and holds no state tensor, so that state which is moved away
    frees its memory.

    Args:
        optimizer: whose rule and state these are.
        device: where its parameters are.
        entries: the parameters; DTensors all of them, or none.
        reads_step: whether a kernel reads how often a tensor was updated.
        counts_on_device: whether steps are counted on `device`.
    """

    first: Found | None  # what `find` would return at the first step; None afterwards
    happened: Tensor | None = None  # float32 [2]: whether the last step happened, and whether not

    def __init__(
        self,
        optimizer: FusedStep,
        device: torch.device,
        entries: Sequence[Entry],
        *,
        reads_step: bool,
        counts_on_device: bool,
    ) -> None:
        self.device = device
        self._params = [entry.param for entry in entries]
        self._states, self._new = states_of(optimizer, entries)
        complete = [{**s, **new} for s, new in zip(self._states, self._new, strict=True)]
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
        self._complete = complete  # until the first step
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def find(self) -> Found | None:
        """This step's tensors, or None where this table no longer describes them."""
        raise NotImplementedError

    def reordered(self, found: Found) -> list[Tensor]:
        """The gradients of which launches read a copy."""
        raise NotImplementedError

    def prepare(self, kinds: frozenset[str]) -> None:
        """Compile what a step under a gate of these kinds launches. Writes nothing."""
        raise NotImplementedError

    def send(self, found: Found, hypers: list[float | Tensor], max_norm: float | None) -> Copies:
        """Bring the tables up to date.

        Returns:
            What the launches read instead of gradients that lie in another order than their
            parameters.
        """
        raise NotImplementedError

    def _launch(self, gate: Gate) -> bool:
        """Launch the updates; False if there was nothing to launch."""
        raise NotImplementedError

    def _own_tensors(self) -> list[Tensor | None]:
        """What launches read and nobody else holds."""
        raise NotImplementedError

    def check_apart(self, found: Found) -> None:
        """Refuse one gradient of two parameters, which would be unscaled twice.

        Raises:
            RuntimeError: there is one.
        """
        addresses = [grad.data_ptr() for grad in found.grads if grad.numel()]
        if len(set(addresses)) != len(addresses):
            raise RuntimeError(
                "two parameters have one gradient tensor, which would be unscaled twice; clone() it"
            )

    def update(self, found: Found, copies: Copies, gate: Gate) -> None:
        """Launch the updates, and count the steps."""
        launched = self._launch(gate)
        if gate.may_skip and not launched:  # a rank without elements counts as the others do
            assert self.happened is not None
            go = self._happens(gate)
            self.happened.copy_(torch.stack([go, ~go]))
        if self._pack is not None:
            happened = self.happened
            self._pack.add_(happened[0] if gate.may_skip and happened is not None else 1)
        if gate.grad_scale is not None:
            for i, copy in copies:
                found.grads[i].copy_(copy)
            increment_version(found.grads)
        increment_version([*found.written, *found.wrappers])
        self._may_have_skipped |= gate.may_skip
        self._outlive_the_stream()

    def _happens(self, gate: Gate) -> Tensor:
        go = torch.ones((), dtype=torch.bool, device=self.device)
        if gate.found_inf is not None:
            go = go & (gate.found_inf == 0).to(self.device, non_blocking=True)
        return go

    def _tell_here(self) -> Tensor:
        """Where kernels tell whether a step happened."""
        if self.happened is None:
            self.happened = torch.arange(1, -1, -1, dtype=torch.float32, device=self.device)
        return self.happened

    def _outlive_the_stream(self) -> None:
        """Keep the tables' memory from reuse until a step on another stream than theirs is done."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            for tensor in (*self._own_tensors(), self.happened):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def hand_over_state(self, optimizer: FusedStep) -> None:
        """After the first step: give the optimizer the state that it made."""
        self.first = None
        self._complete = []
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
