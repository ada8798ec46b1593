"""The tensors that the kernels update on one device: their state, and a step of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import compress, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..launch import backend
from ..launch.chunking import PlannedParam
from ..launch.device_buffer import Buffer
from ..launch.kernel_args import Tables
from ..launch.pointer_tables import addresses_of, on_device
from ..rule import State
from ..tensors.layout import LayoutGuard, picker
from .conditions import StepConditions
from .counting import Counting
from .state import Holders, states_of
from .step_tensors import CurrentTensors, GradCopies, StepTensors, present_of
from .view import OptimizerView


class LaunchGroup:
    """Everything one device's launches need, made once and kept while the tensors stay.

    It remembers addresses, layouts and places, and holds no tensor of the optimizer's, so that what
    is taken from the optimizer frees its memory.

    Args:
        planned: the parameters; DTensors all of them, or none.
        n_hypers: hyperparameters of all parameter groups together.
    """

    first_inputs: StepTensors  # what `read` would return at the first step
    step_status: Tensor | None = None  # float32 [2]: 1 if it was taken, 1 if skipped
    _formats: Tensor | None = None  # the table of formats, on the host
    _grad_columns = 1  # of the table of gradients; the last is an address

    def __init__(
        self,
        view: OptimizerView,
        device: torch.device,
        planned: Sequence[PlannedParam],
        n_hypers: int,
    ) -> None:
        self.device, self._rule, self._options = device, view.rule, view.options
        self._remainders = view.remainders
        self._pick = picker([item.position for item in planned])
        self._pick_states: Callable[[Sequence[Any]], Sequence[Any]] | None = None
        self._states, self._new = states_of(view, planned)
        states = [{**s, **new} for s, new in zip(self._states, self._new, strict=True)]
        self._all = bytes(repeat(1, len(planned)))
        self._holders = Holders(planned, counts_steps=self._rule.counts_step)
        self._pick_stateful = picker(self._holders.stateful)
        self._counting = Counting(
            view, planned, states, [*map(bool, self._new)], device, reads=self._reads_step(planned)
        )
        grads, params = [item.grad for item in planned], [item.param for item in planned]
        tensors = self._tensors(grads, params, self._pick_stateful(states))
        self.first_inputs = self._of_present(tensors, present_of(tensors.grads))
        self._addresses = addresses_of([*tensors.written, *tensors.steps])
        self._guard = self._layout_guard(planned, tensors)
        rows = self._chunk(planned, states)
        counting = self._counting
        buffer = Buffer(device, self._grad_columns * len(planned), n_hypers, counting.n_sent)
        self._buffer = buffer
        self.tables = Tables(
            rows=on_device(rows, device),
            grads=buffer.grads,
            hypers=buffer.hypers.view(len(view.groups), -1),
            steps=buffer.steps if counting.n_sent else counting.column,
            formats=None if self._formats is None else on_device(self._formats, device),
            max_norm=buffer.max_norm,
        )
        self._launches: dict[frozenset[str], list[Any]] = {}
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def _reads_step(self, planned: Iterable[PlannedParam]) -> bool:
        """Whether a kernel reads how often a tensor was updated."""
        raise NotImplementedError

    def _tensors(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], states: Sequence[State]
    ) -> StepTensors:
        """The tensors of a step, as if all gradients were there."""
        raise NotImplementedError

    def _layout_guard(self, planned: Sequence[PlannedParam], tensors: StepTensors) -> LayoutGuard:
        raise NotImplementedError

    def _chunk(self, planned: Sequence[PlannedParam], states: Sequence[State]) -> Tensor:
        """Cut the tensors into launches; the table of tensors, on the host."""
        raise NotImplementedError

    def _compile(self, enabled: frozenset[str]) -> list[Any]:
        """The launches of a step under these conditions."""
        raise NotImplementedError

    def _of_present(self, tensors: StepTensors, present: bytes) -> StepTensors:
        """Of a step without some gradients, what it writes."""
        if 0 not in present:
            return tensors
        mask = self._holders.written(present)
        written, dtensors = compress(tensors.written, mask), compress(tensors.dtensors, mask)
        pairs = zip(self._holders.remainders, tensors.remainders, strict=False)
        remainders = [pair for (i, _), pair in pairs if present[i]]
        return tensors._replace(
            present=present, written=[*written], dtensors=[*dtensors], remainders=remainders
        )

    def _mine(self, current: CurrentTensors) -> tuple[Sequence[Tensor], Sequence[State]]:
        """Parameters, and the state of those that have any.

        Raises:
            KeyError: state lies in another order.
        """
        params = self._pick(current.params)
        if self._pick_states is None:
            return params, ()
        keys, states = self._pick_states(current.keys), self._pick_states(current.states)
        stateful = self._pick_stateful(params)
        if len(keys) != len(stateful) or any(map(is_not, keys, stateful)):
            raise KeyError
        return params, states

    def read(self, current: CurrentTensors) -> StepTensors | None:
        """This step's tensors, or None where this table no longer describes them.

        It does while parameters and state are where they were, and everything but what is missing
        has the layout, and gradients the alignment, for which kernels were compiled.
        """
        raise NotImplementedError

    def grads_to_copy(self, tensors: StepTensors) -> list[tuple[int, Tensor]]:
        """The gradients that lie in another order than their parameters, with their indices."""
        raise NotImplementedError

    def compile(self, enabled: frozenset[str]) -> None:
        """Compile what a step under these conditions launches. Writes nothing."""
        if enabled in self._launches:
            return
        if enabled and self.step_status is None:
            self.step_status = torch.arange(1, -1, -1, dtype=torch.float32, device=self.device)
            self.tables = self.tables._replace(step_status=self.step_status)
        self._launches[enabled] = self._compile(enabled)

    def _compile_counts(self, enabled: frozenset[str], tables: Tables) -> None:
        n = self._grad_columns * len(self._all)
        grads = tables.grads[:n].view(-1, self._grad_columns)
        self._counting.compile(enabled, grads, tables)

    def upload(
        self, tensors: StepTensors, hypers: list[float | Tensor], max_norm: float | None
    ) -> GradCopies:
        """Bring the tables up to date; what the launches read instead of some gradients."""
        raise NotImplementedError

    def _launch(self, scalars: Mapping[str, Tensor], conditions: StepConditions) -> bool:
        """Launch the updates; False if there was nothing to launch."""
        raise NotImplementedError

    def _own_tensors(self) -> list[Tensor]:
        """What launches read beside the tables, and nobody else holds."""
        return []

    def update(self, tensors: StepTensors, copies: GradCopies, conditions: StepConditions) -> None:
        """Launch the updates, and count the steps."""
        if not (conditions.enabled or 1 in tensors.present):
            return
        if tensors.remainders:
            self.drop_stale(tensors)
        scalars = conditions.kernel_args(self.device) if conditions.enabled else {}
        self._counting.launch(scalars, conditions)
        launched = self._launch(scalars, conditions)
        if conditions.may_skip and not launched:  # a rank without elements counts as the others do
            assert self.step_status is not None
            taken = self._is_taken(conditions)
            self.step_status.copy_(torch.stack([taken, ~taken]))
        everyone = tensors.present is self._all
        self._counting.add(tensors.steps, None if everyone else tensors.present)
        if conditions.grad_scale is not None:
            for i, copy in copies:
                grad = tensors.grads[i]
                assert grad is not None
                grad.copy_(copy)
            increment_version([grad for grad in tensors.grads if grad is not None])
        self.bump_versions(tensors)
        self._outlive_the_stream()

    def drop_stale(self, tensors: StepTensors) -> None:
        """Let parameters that were written since their latest update have no remainder.

        Raises:
            RuntimeError: there are some, and a CUDA graph would drop theirs in every replay.
        """
        if backend.is_capturing(self.device) and self._remainders.stale(tensors.remainders):
            raise RuntimeError(
                "a CUDA graph is captured, but a parameter was written since its latest step, so "
                "that every replay would drop its float32 value; make a step before the capture, "
                "or use GraphedStep"
            )
        self._remainders.drop(tensors.remainders)

    def bump_versions(self, tensors: StepTensors) -> None:
        """Tell torch what was written."""
        increment_version([*tensors.written, *tensors.dtensors, *tensors.counted])
        if tensors.remainders:
            self._remainders.keep(tensors.remainders)

    def _is_taken(self, conditions: StepConditions) -> Tensor:
        taken = torch.ones((), dtype=torch.bool, device=self.device)
        if conditions.found_inf is not None:
            taken = taken & (conditions.found_inf == 0).to(self.device, non_blocking=True)
        return taken

    def _outlive_the_stream(self) -> None:
        """Keep the tables' memory from reuse until a step on another stream than theirs is done."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            tables = (self._buffer.memory, self.tables.rows, self.tables.formats)
            own = (*self._own_tensors(), *self._counting.tensors)
            for tensor in (*tables, self.step_status, *own):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def commit_state(self, states: MutableMapping[Tensor, State], params: Sequence[Tensor]) -> None:
        """After the first step: give the optimizer, which has these parameters, its new state."""
        del self.first_inputs
        for param, state, new in zip(self._pick(params), self._states, self._new, strict=True):
            if new:
                state.update(new)
                states[param] = state
        self._states, self._new = [], []

    def remember_places(self, places: Mapping[int, int], params: Sequence[Tensor]) -> None:
        """Where state lies in optimizer.state, by the id of a parameter."""
        if self._holders.stateful:
            stateful = self._pick_stateful(self._pick(params))
            self._pick_states = picker([places[id(param)] for param in stateful])

    def forget_skipped(self, states: MutableMapping[Tensor, State]) -> None:
        """Take back state of which no step was taken yet; see `Counting.forget_skipped`."""
        self._counting.forget_skipped(states, {*self._addresses})
