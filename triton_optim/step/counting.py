"""Who counts how often each tensor of a launch group was updated, and what kernels read of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from ..launch.chunking import PlannedParam
from ..launch.kernel_args import Tables
from ..launch.launcher import Launch
from ..launch.pointer_tables import on_device
from ..rule import State
from ..storage import REMAINDER
from .conditions import StepConditions
from .host_scalars import HostScalars
from .state import bring_together, counters_of
from .step_counts import DeviceCounts, HostCounts, SeenCounts
from .view import OptimizerView


class Counting:
    """The host counts, or a launch on the device that reads there whether the step is taken.

    Args:
        planned: the tensors.
        states: theirs.
        is_new: 1 of each whose state was made for the step to come.
        device: theirs.
        reads: whether a kernel reads how often a tensor was updated.

    Attributes:
        n_sent: of the numbers that the host sends before each step.
    """

    def __init__(
        self,
        view: OptimizerView,
        planned: Sequence[PlannedParam],
        states: Sequence[State],
        is_new: Sequence[bool],
        device: torch.device,
        *,
        reads: bool,
    ) -> None:
        self._n_groups = len(view.groups)
        self._host: HostCounts | HostScalars | SeenCounts | None = None
        self._device: DeviceCounts | None = None
        self._private: Tensor | None = None  # float64, counts that no state has
        self._ids: dict[int, int] = {}  # the places of their parameters
        self._may_have_skipped = False
        self._launches: dict[frozenset[str], Launch] = {}
        on_host, seen = not view.counts_on_device, [not new for new in is_new]
        if view.rule.counts_step:
            self._count_in_state(view, planned, states, device, reads=reads)
        elif reads and on_host:
            self._host = SeenCounts(seen)
        elif reads:
            # No weak references: with one, torch.utils.swap_tensors refuses a parameter.
            self._ids = {id(item.param): i for i, item in enumerate(planned)}
            self._private = on_device(torch.tensor(seen, dtype=torch.float64, device="cpu"), device)
            self._device = DeviceCounts(self._private.unbind(), device, reads=True)
        sends = reads and self._host is not None
        self.n_sent = len(planned) * view.rule.step_columns if sends else 0

    def _count_in_state(
        self,
        view: OptimizerView,
        planned: Sequence[PlannedParam],
        states: Sequence[State],
        device: torch.device,
        *,
        reads: bool,
    ) -> None:
        scalars, steps = view.rule.scalars, counters_of(view.rule, states)
        if view.counts_on_device or not all(step.is_cpu for step in steps):
            bring_together(steps[: len(planned)], device)
            bring_together(steps[len(planned) :], device)
            self._device = DeviceCounts(steps, device, reads=reads, scalars=scalars)
        elif scalars is None:
            self._host = HostCounts(steps, view.counters)
        else:
            groups = [item.group for item in planned]
            self._host = HostScalars(scalars, steps, groups, view.counters)

    @property
    def column(self) -> Tensor | None:
        """Float64 on the device: what its launch tells the update."""
        return None if self._device is None else self._device.column

    @property
    def tensors(self) -> list[Tensor]:
        """What launches use and nobody else holds."""
        private = [] if self._private is None else [self._private]
        return private if self._device is None else [*private, *self._device.tensors]

    def to_send(self, steps: Sequence[Tensor], hypers: Sequence[float | Tensor]) -> Sequence[float]:
        """The numbers for the step to come."""
        if self._host is None or not self.n_sent:
            return ()
        if isinstance(self._host, HostScalars):
            return self._host.values(steps, hypers, len(hypers) // self._n_groups)
        return self._host.values(steps)

    def read(self, steps: Sequence[Tensor]) -> None:
        """Tell the update what the counters hold, and count nothing."""
        if self._device is not None:
            self._device.read(steps)

    def compile(self, enabled: frozenset[str], grads: Tensor, tables: Tables) -> None:
        """The launch of a step under these conditions; see `DeviceCounts.launch`."""
        if self._device is not None:
            self._launches[enabled] = self._device.launch(grads, enabled, tables)

    def launch(self, scalars: Mapping[str, Tensor], conditions: StepConditions) -> None:
        """Let the device count, before the update."""
        if self._device is not None:
            launch = self._launches[conditions.enabled]
            launch.run(**{k: v for k, v in scalars.items() if k in launch.arguments})
        self._may_have_skipped |= conditions.may_skip

    def add(self, steps: Sequence[Tensor], present: bytes | None) -> None:
        """Let the host count, after the update: each tensor, or those whose byte is 1."""
        if self._host is not None:
            self._host.add(steps, present)

    def forget_skipped(
        self, states: MutableMapping[Tensor, State], addresses: Collection[int]
    ) -> None:
        """Take back state of which no step was taken yet, if that can be; waits for the device.

        Where the rule must know its first update and state does not tell.
        """
        if self._private is None or not self._may_have_skipped:
            return
        updates = self._private.tolist()
        for param, state in [*states.items()]:
            place = self._ids.get(id(param))
            if place is not None and updates[place] == 0:
                held = (value for value in state.values() if isinstance(value, Tensor))
                if all(value.data_ptr() in addresses for value in held):
                    for name in state.keys() - {REMAINDER}:  # which may have been loaded
                        del state[name]
                    if not state:
                        del states[param]
        self._may_have_skipped = False
