"""The tensors that the kernels update on one device: their state, and a step of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import compress, repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..launch.chunking import PlannedParam
from ..launch.device_buffer import Buffer
from ..launch.launcher import Launch
from ..launch.pointer_tables import addresses_of, on_device
from ..rule import State
from ..tensors.layout import picker
from .conditions import StepConditions
from .state import Holders, bring_together, get_step, states_of
from .step_counts import DeviceCounts, HostCounts, SeenCounts
from .view import OptimizerView

GradCopies = list[tuple[int, Tensor]]  # what stands in for a gradient, by its index


class CurrentTensors(NamedTuple):
    """The optimizer's tensors as they are now: nothing of it is kept."""

    params: Sequence[Tensor]  # of all groups
    keys: Sequence[Tensor]  # of optimizer.state
    states: Sequence[State]

    @classmethod
    def of(cls, view: OptimizerView, params: Sequence[Tensor]) -> CurrentTensors:
        return cls(params, [*view.state], [*view.state.values()])


class StepTensors(NamedTuple):
    """What one step reads and writes, looked up and checked for this step: shards of DTensors."""

    grads: Sequence[Tensor | None]  # of sparse ones, the values; None of one that is missing
    present: bytes  # 1 of a gradient that is there
    shards: Sequence[Tensor]  # all parameters
    written: Sequence[Tensor]  # parameters that have a gradient, and their state
    wrappers: Sequence[Tensor]  # the DTensors of `written`
    steps: Sequence[Tensor]  # all step counts
    ids: Sequence[Tensor] = ()  # int64 [1, rows], of sparse gradients

    @property
    def counted(self) -> Iterable[Tensor]:
        """The step counts of parameters that have a gradient."""
        return self.steps if 0 not in self.present else compress(self.steps, self.present)


class LaunchGroup:
    """Everything one device's launches need, made once and kept while the tensors stay.

    It remembers addresses, layouts and places, and holds no tensor of the optimizer's, so that what
    is taken from the optimizer frees its memory.

    Args:
        view: of the optimizer.
        device: where its parameters are.
        entries: the parameters; DTensors all of them, or none.
        reads_step: whether a kernel reads how often a tensor was updated.
        counts_on_device: whether steps are counted on `device`.
    """

    _addresses: list[int]  # of parameters, state and step counts
    first_inputs: StepTensors  # what `read` would return at the first step
    step_status: Tensor | None = None  # float32 [2]: 1 if it was taken, 1 if skipped

    def __init__(
        self,
        view: OptimizerView,
        device: torch.device,
        entries: Sequence[PlannedParam],
        *,
        reads_step: bool,
        counts_on_device: bool,
    ) -> None:
        self.device = device
        self._pick = picker([entry.position for entry in entries])
        self._pick_states: Callable[[Sequence[Any]], Sequence[Any]] | None = None
        self._states, self._new = states_of(view, entries)
        complete = [{**s, **new} for s, new in zip(self._states, self._new, strict=True)]
        self._complete: Sequence[State] = complete
        self._all = bytes(repeat(1, len(entries)))
        self._counts_steps = view.rule.counts_step
        self._holders = Holders(entries, counts_steps=self._counts_steps)
        self._pick_stateful = picker(self._holders.stateful)
        self._reads_step = reads_step
        self._private: Tensor | None = None  # float64, counts that no state has
        self._may_have_skipped = False
        self._ids: dict[int, int] = {}  # where parameters stand in it
        counts = self._counts_of(view, entries, counts_on_device=counts_on_device)
        self._device_counts = counts if isinstance(counts, DeviceCounts) else None
        self._host_counts = None if isinstance(counts, DeviceCounts) else counts
        sends = reads_step and self._host_counts is not None
        self._n_steps_sent = len(entries) if sends else 0
        self._count_launches: dict[frozenset[str], Launch] = {}
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def _counts_of(
        self, view: OptimizerView, entries: Sequence[PlannedParam], *, counts_on_device: bool
    ) -> HostCounts | SeenCounts | DeviceCounts | None:
        if self._counts_steps:
            steps = [*map(get_step, self._complete)]
            if not counts_on_device and all(step.is_cpu for step in steps):
                return HostCounts(steps, view.counters)
            bring_together(steps, self.device)
            return DeviceCounts(steps, self.device, reads=self._reads_step)
        if not self._reads_step:
            return None
        seen = [not new for new in self._new]
        if not counts_on_device:
            return SeenCounts(seen)
        # No weak references: with one, torch.utils.swap_tensors refuses a parameter.
        self._ids = {id(entry.param): i for i, entry in enumerate(entries)}
        on_host = torch.tensor(seen, dtype=torch.float64, device="cpu")
        self._private = on_device(on_host, self.device)
        return DeviceCounts(self._private.unbind(), self.device, reads=True)

    def _found(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], states: Sequence[State]
    ) -> StepTensors:
        """The tensors of a step, as if all gradients were there."""
        raise NotImplementedError

    def _first_found(self, entries: Sequence[PlannedParam]) -> StepTensors:
        """Those of the first step; keeps where they are."""
        grads, params = [e.grad for e in entries], [e.param for e in entries]
        found = self._found(grads, params, self._pick_stateful(self._complete))
        self.first_inputs = self._of_present(found, present_of(found.grads))
        self._addresses = addresses_of([*found.written, *found.steps])
        return found

    def _of_present(self, found: StepTensors, present: bytes) -> StepTensors:
        """Of a step without some gradients, what it writes."""
        if 0 not in present:
            return found
        mask = self._holders.written(present)
        written, wrappers = compress(found.written, mask), compress(found.wrappers, mask)
        return found._replace(present=present, written=[*written], wrappers=[*wrappers])

    def _steps_read(self, buffer: Buffer) -> Tensor | None:
        """Where the kernel reads the steps: float64 [tensors]."""
        if self._device_counts is not None:
            return self._device_counts.column
        return buffer.steps if self._n_steps_sent else None

    def _mine(self, current: CurrentTensors) -> tuple[Sequence[Tensor], Sequence[State]] | None:
        """Parameters, and the state of those that have any; None if that lies in another order."""
        params = self._pick(current.params)
        if self._pick_states is None:
            return params, ()
        keys, states = self._pick_states(current.keys), self._pick_states(current.states)
        stateful = self._pick_stateful(params)
        if len(keys) != len(stateful) or any(map(is_not, keys, stateful)):
            return None
        return params, states

    def read(self, current: CurrentTensors) -> StepTensors | None:
        """This step's tensors, or None where this table no longer describes them."""
        raise NotImplementedError

    def grads_to_copy(self, found: StepTensors) -> list[Tensor]:
        """The gradients of which launches read a copy."""
        raise NotImplementedError

    def compile(self, enabled: frozenset[str]) -> None:
        """Compile what a step under these conditions launches. Writes nothing."""
        raise NotImplementedError

    def _prepare_counts(
        self, enabled: frozenset[str], grads: Tensor, told: Mapping[str, Tensor | None]
    ) -> None:
        if self._device_counts is not None:
            self._count_launches[enabled] = self._device_counts.launch(grads, enabled, told)

    def upload(
        self, found: StepTensors, hypers: list[float | Tensor], max_norm: float | None
    ) -> GradCopies:
        """Bring the tables up to date.

        Returns:
            What the launches read instead of gradients that lie in another order than their
            parameters.
        """
        raise NotImplementedError

    def _steps_to_send(self, found: StepTensors) -> Sequence[float]:
        counts = self._host_counts
        return counts.values(found.steps) if counts is not None and self._n_steps_sent else ()

    def _launch(self, told: Mapping[str, Tensor], conditions: StepConditions) -> bool:
        """Launch the updates; False if there was nothing to launch."""
        raise NotImplementedError

    def _own_tensors(self) -> list[Tensor | None]:
        """What launches read and nobody else holds."""
        raise NotImplementedError

    def check_no_overlap(self, found: StepTensors) -> None:
        """Refuse one gradient of two parameters, which would be unscaled twice.

        Raises:
            RuntimeError: there is one.
        """
        grads = (grad for grad in found.grads if grad is not None and grad.numel())
        addresses = [grad.data_ptr() for grad in grads]
        if len(set(addresses)) != len(addresses):
            raise RuntimeError(
                "two parameters have one gradient tensor, which would be unscaled twice; clone() it"
            )

    def update(self, found: StepTensors, copies: GradCopies, conditions: StepConditions) -> None:
        """Launch the updates, and count the steps."""
        if not (conditions.enabled or 1 in found.present):
            return
        told = conditions.kernel_args(self.device) if conditions.enabled else {}
        if self._device_counts is not None:
            launch = self._count_launches[conditions.enabled]
            launch.run(**{k: v for k, v in told.items() if k in launch.arguments})
        launched = self._launch(told, conditions)
        if conditions.may_skip and not launched:  # a rank without elements counts as the others do
            assert self.step_status is not None
            go = self._happens(conditions)
            self.step_status.copy_(torch.stack([go, ~go]))
        if self._host_counts is not None:
            everyone = found.present is self._all
            self._host_counts.add(found.steps, None if everyone else found.present)
        if conditions.grad_scale is not None:
            for i, copy in copies:
                grad = found.grads[i]
                assert grad is not None
                grad.copy_(copy)
            increment_version([grad for grad in found.grads if grad is not None])
        increment_version([*found.written, *found.wrappers, *found.counted])
        self._may_have_skipped |= conditions.may_skip
        self._outlive_the_stream()

    def _happens(self, conditions: StepConditions) -> Tensor:
        go = torch.ones((), dtype=torch.bool, device=self.device)
        if conditions.found_inf is not None:
            go = go & (conditions.found_inf == 0).to(self.device, non_blocking=True)
        return go

    def _tell_here(self) -> Tensor:
        """Where kernels tell whether a step step_status."""
        if self.step_status is None:
            self.step_status = torch.arange(1, -1, -1, dtype=torch.float32, device=self.device)
        return self.step_status

    def _outlive_the_stream(self) -> None:
        """Keep the tables' memory from reuse until a step on another stream than theirs is done."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            counts = self._device_counts.tensors if self._device_counts is not None else ()
            for tensor in (*self._own_tensors(), self.step_status, self._private, *counts):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def commit_state(self, states: MutableMapping[Tensor, State], params: Sequence[Tensor]) -> None:
        """After the first step: give the optimizer the state that it made.

        Args:
            params: all of the optimizer's.
        """
        del self.first_inputs
        for param, state, new in zip(self._pick(params), self._states, self._new, strict=True):
            if new:
                state.update(new)
                states[param] = state
        self._states, self._new, self._complete = [], [], []

    def remember_places(self, places: Mapping[int, int], params: Sequence[Tensor]) -> None:
        """Where the state of its parameters lies in optimizer.state.

        Args:
            places: by a parameter's id.
            params: all of the optimizer's.
        """
        if self._holders.stateful:
            stateful = self._pick_stateful(self._pick(params))
            self._pick_states = picker([places[id(param)] for param in stateful])

    def forget_skipped(self, states: MutableMapping[Tensor, State]) -> None:
        """Take back state of which no step was taken yet, if that can be; waits for the device.

        Where the rule must know its first update and state does not tell.
        """
        if self._private is None or not self._may_have_skipped:
            return
        updates, addresses = self._private.tolist(), {*self._addresses}
        for param, state in [*states.items()]:
            place = self._ids.get(id(param))
            if place is not None and updates[place] == 0:
                held = (value for value in state.values() if isinstance(value, Tensor))
                if all(value.data_ptr() in addresses for value in held):
                    del states[param]
        self._may_have_skipped = False


def present_of(grads: Iterable[Tensor | None]) -> bytes:
    """1 of each that is there."""
    return bytes(map(is_not, grads, repeat(None)))
