"""A step's launches, kept while the optimizer's tensors stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..launch import backend
from ..launch.chunking import GradSignature
from ..options import Group
from ..tensors.layout import LayoutGuard
from . import grad_norm
from .conditions import StepConditions
from .dense import DenseLaunchGroup
from .launch_group import LaunchGroup
from .routing import is_traced, unsupported
from .step_tensors import CurrentTensors, GradCopies, StepTensors, present_of
from .validation import check_indices, check_unscaling
from .view import OptimizerView

UNWATCHED = frozenset({"params", "param_names", "_places"})  # keys of a group that are no values


class Values:
    """The values in the parameter groups, and the hyperparameters that kernels get of them."""

    def __init__(self, view: OptimizerView, *, uses_kernels: bool) -> None:
        self._uses_kernels = uses_kernels
        self.structure = view.structure_key()
        self._watch(view)
        self._keep(view, self._read(view))

    def update(self, view: OptimizerView) -> bool:
        """Bring the hyperparameters up to date; False if parameters go other routes now."""
        values = self._read(view)
        if self._mutate or not_identical(values, self._values):
            view.check_hyperparameters()
            if view.structure_key() != self.structure:
                return False
            self._keep(view, values)
        return True

    def _read(self, view: OptimizerView) -> list[object]:
        if [*map(len, view.groups)] != self._sizes:
            self._watch(view)
        groups = zip(self._getters, view.groups, strict=True)
        try:
            return [*chain.from_iterable([get(group) for get, group in groups])]
        except KeyError:  # a name went and another came
            self._watch(view)
            return self._read(view)

    def _watch(self, view: OptimizerView) -> None:
        self._sizes = [*map(len, view.groups)]
        self._getters = [_getter(group.keys() - UNWATCHED) for group in view.groups]

    def _keep(self, view: OptimizerView, values: list[object]) -> None:
        self._values: list[object] = []  # until all is done: an interrupt may come between
        self.hyperparameters = view.hyperparameters() if self._uses_kernels else []
        self._mutate = not all(map(_is_constant, values))
        self._values = values


def _getter(names: Iterable[str]) -> Callable[[Group], Sequence[object]]:
    """What reads these values of a group, at C's speed."""
    names = sorted(names)
    return itemgetter(*names) if len(names) > 1 else lambda group: [group[name] for name in names]


def _is_constant(value: object) -> bool:
    """Whether it cannot change while it is the same object."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, float | int | str)


@dataclass
class Others:
    """The parameters that no kernel takes, by position, and how they are watched."""

    without_grad: list[int] = field(default_factory=list)  # none until now
    fallback: list[int] = field(default_factory=list)
    strided: list[int] = field(default_factory=list)  # of fallback, those that `guard` can watch
    # and the others, whose gradient may become dense, with their group and name
    other: list[tuple[int, int, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of all parameters, where some fall back
    guard: LayoutGuard | None = None  # of `strided`: gradients, then parameters

    def watch(self, signatures: Sequence[GradSignature | None], params: Iterable[Tensor]) -> None:
        seen = [item for i in self.strided if (item := signatures[i]) is not None]
        layouts = [*(item.grad for item in seen), *(item.param for item in seen)]
        rows = [(i, len(seen) + i) for i in range(len(seen))]
        self.guard = LayoutGuard([layout for layout in layouts if layout is not None], rows)
        self.ids = [*map(id, params)] if self.fallback else []

    def changed(self, view: OptimizerView, params: Sequence[Tensor]) -> bool:
        """Whether one of them must be looked at again."""
        if not (self.fallback or self.without_grad):
            return False
        if self.fallback and [*map(id, params)] != self.ids:
            return True
        for i, index, where in self.other:
            param, grad = params[i], params[i].grad
            if grad is None:
                continue
            if grad.layout == torch.sparse_coo and not is_traced():
                check_indices(grad._indices(), param.shape, where)
            if unsupported(view, param, grad, view.groups[index]) is None:
                return True
        if any(params[i].grad is not None for i in self.without_grad):
            return True
        assert self.guard is not None
        watched = [params[i] for i in self.strided]
        grads = [param.grad for param in watched]
        tensors = [*grads, *watched]
        return not (self.guard.check(tensors) or self.guard.check_rows(tensors, present_of(grads)))


class Plan:
    """How an optimizer steps, for as long as its tensors stay where they are.

    It holds none of the optimizer's tensors. A parameter belongs to it from its first gradient on,
    also in steps in which it has none.

    Args:
        signatures: of each parameter's latest gradient.
    """

    def __init__(
        self,
        view: OptimizerView,
        launch_groups: Sequence[LaunchGroup],
        others: Others,
        signatures: Sequence[GradSignature | None],
        values: Values,
    ) -> None:
        self.launch_groups, self.signatures = launch_groups, signatures
        self._others, self._values = others, values
        self.has_fallback = bool(others.fallback)  # to torch's implementation
        self._compiled: set[frozenset[str]] = set()
        self.lengths, self._may_skip = view.lengths, view.may_skip
        self._is_inference = torch.is_inference_mode_enabled()
        gpus = {group.device for group in launch_groups}
        self.gpus = {gpu for gpu in gpus if gpu.type in backend.CAPTURABLE_DEVICE_TYPES}

    @property
    def structure(self) -> list[tuple[object, ...]]:
        """See `OptimizerView.structure_key`."""
        return self._values.structure

    def fallback(self, view: OptimizerView) -> list[Tensor]:
        """The parameters that fall back to torch's implementation."""
        params = [*view.params]
        return [params[i] for i in self._others.fallback]

    def is_prepared(self, conditions: StepConditions) -> bool:
        """Whether all kernels of such a step are compiled."""
        return conditions.enabled in self._compiled

    def read(self, view: OptimizerView) -> list[StepTensors] | None:
        """This step's tensors by launch group; None if the plan no longer fits the optimizer."""
        if (
            view.lengths != self.lengths
            or not self._values.update(view)
            or self._may_skip != view.may_skip
            or self._is_inference != torch.is_inference_mode_enabled()
        ):
            return None
        params = [*view.params]
        if self._others.changed(view, params):
            return None
        inputs = []
        current = CurrentTensors.of(view, params)
        for group in self.launch_groups:
            tensors = group.read(current)
            if tensors is None:
                return None
            inputs.append(tensors)
        return inputs

    def compile(self, inputs: Sequence[StepTensors], conditions: StepConditions) -> None:
        """Compile what a step under these conditions launches; nothing is written.

        Raises:
            RuntimeError: the conditions do not go with the tensors.
        """
        enabled = conditions.enabled
        if not enabled and enabled in self._compiled:
            return
        for group, tensors in zip(self.launch_groups, inputs, strict=True):
            if enabled:
                conditions.check_device(group.device)
            if conditions.grad_scale is not None:
                check_unscaling(tensors.grads, group.grads_to_copy(tensors))
            group.compile(enabled)
        self._compiled.add(enabled)

    def upload(self, inputs: Sequence[StepTensors], conditions: StepConditions) -> list[GradCopies]:
        """Bring the tables on the device up to date; nothing of the optimizer is written."""
        hyperparameters = self._values.hyperparameters
        return [
            group.upload(tensors, hyperparameters, conditions.max_norm)
            for group, tensors in zip(self.launch_groups, inputs, strict=True)
        ]

    def grad_norm(self, fallback: Iterable[Tensor], conditions: StepConditions) -> Tensor:
        """The norm of all gradients, those of `fallback` too, over all ranks: float64 [].

        It is valid until the next step.
        """
        dense = (group for group in self.launch_groups if isinstance(group, DenseLaunchGroup))
        norms = [group.sum_squares(conditions) for group in dense]
        grads = (param.grad for param in fallback if param.grad is not None)
        return grad_norm.total(norms, grad_norm.square_sums(grads, conditions.grad_scale))

    def launch(
        self,
        inputs: Sequence[StepTensors],
        copies: Sequence[GradCopies],
        conditions: StepConditions,
    ) -> None:
        """Launch the updates and count the steps."""
        for group, tensors, replaced in zip(self.launch_groups, inputs, copies, strict=True):
            group.update(tensors, replaced, conditions)

    def skipped(self) -> Tensor | None:
        """Float32 []: 1 where the last step was skipped, or 0. None without launches."""
        status = self.launch_groups[0].step_status if self.launch_groups else None
        return None if status is None else status[1]

    def forget_skipped(self, view: OptimizerView) -> None:
        """Take back state that skipped steps made; see `LaunchGroup.forget_skipped`."""
        for group in self.launch_groups:
            group.forget_skipped(view.state)

    def commit_state(self, view: OptimizerView) -> None:
        """After the first step: its new state is the optimizer's now."""
        params = [*view.params]
        for group in self.launch_groups:
            group.commit_state(view.state, params)
        places = {id(param): i for i, param in enumerate(view.state)}
        for group in self.launch_groups:
            group.remember_places(places, params)


def not_identical(objects: Iterable[object], others: Sequence[Any]) -> bool:
    """Whether these are not the very same objects. A tensor's == would compare its elements."""
    objects = [*objects]
    return len(objects) != len(others) or any(map(is_not, objects, others))
