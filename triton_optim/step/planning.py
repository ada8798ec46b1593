"""Makes a plan: checks every parameter, and chooses between the kernels and the fallback."""

from __future__ import annotations

import gc
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..launch import backend
from ..launch.chunking import PlannedParam
from ..launch.grad_signature import GradSignature
from ..tensors.layout import Layout, strides_agree
from ..tensors.sharding import PLAIN_TYPES, is_dtensor, local, redistribute_grad, reduce_groups
from .capture import check_capturable
from .dense import DenseLaunchGroup
from .plan import MisplacedState, Others, Plan, Values
from .routing import is_traced, misplaced, unsupported
from .row_wise import RowWiseLaunchGroup
from .state import check_state_of
from .validation import (
    check_fallback,
    check_indices,
    check_meshes,
    check_no_overlap,
    check_requested,
    check_row_wise,
    check_tensors,
)
from .view import OptimizerView

Named = list[tuple[Tensor, str]]  # tensors, each with its description


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Collect no garbage meanwhile: among many new objects that takes as long as making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Planning:
    """Everything is checked when it is made, and nothing written before `finish`.

    Args:
        view: of the optimizer, whose parameters have their gradients.
        previous: the plan before, which knows parameters that have no gradient now.

    Raises:
        RuntimeError: a gradient or a state tensor does not fit its parameter, tensors share memory,
            or `fused=True` asks for kernels where there are none.
    """

    @_gc_paused()
    def __init__(self, view: OptimizerView, previous: Plan | None = None) -> None:
        self._view = view
        view.check_hyperparameters()
        params = [*view.params]
        self._signatures: list[GradSignature | None] = [None] * len(params)
        if previous is not None and previous.lengths == view.lengths:
            same = previous.structure == view.structure_key()
            # if not, what falls back may go another route
            self._signatures = [
                item if same or item is None or item.is_taken else None
                for item in previous.signatures
            ]
        self._others = Others()
        # by device, DTensors and row-wise ones apart
        self._planned: dict[tuple[torch.device, bool, bool], list[PlannedParam]] = defaultdict(list)
        self._misplaced: list[MisplacedState] = []
        self._written: Named = []
        self._written_later: Named = []  # once there is a gradient again
        self._facts = [(view.rule.state_names(g), view.rule.active_flags(g)) for g in view.groups]
        self._listed = Counter(map(id, params))
        for position, (param, index, where) in enumerate(view.named()):
            self._add(position, param, index, where)
        check_no_overlap(self._written)
        if self._written_later:
            self._leave_out_overlapping()
        if view.options.max_grad_norm is not None:
            check_meshes(param for param in params if param.grad is not None)
        self._values = Values(view, uses_kernels=bool(self._planned))

    @property
    def gpus(self) -> set[torch.device]:
        """Where kernels would run."""
        devices = {device for device, *_ in self._planned}
        return {gpu for gpu in devices if gpu.type in backend.CAPTURABLE_DEVICE_TYPES}

    @_gc_paused()
    def finish(self) -> Plan:
        """Bring state to its place, make what is missing, and the launches."""
        view, on_device = self._view, self._view.counts_on_device
        for item in self._misplaced:
            item.move()
        launch_groups = [
            (RowWiseLaunchGroup if row_wise else DenseLaunchGroup)(
                view, device, planned, self._values.hyperparameters, counts_on_device=on_device
            )
            for (device, _, row_wise), planned in self._planned.items()
        ]
        self._others.watch(self._signatures, view.params)
        return Plan(view, launch_groups, self._others, self._signatures, self._values)

    def _add(self, position: int, param: Tensor, index: int, where: str) -> None:
        view, group = self._view, self._view.groups[index]
        redistribute_grad(param)
        grad, signature = param.grad, self._signatures[position]
        if grad is None and not self._goes_on(param, index, signature):
            self._others.without_grad.append(position)
            return
        if grad is not None:
            check_tensors(param, grad, where)
            if grad.layout == torch.sparse_coo and not is_traced():
                check_indices(grad._indices(), param.shape, where)
        check_capturable(view.options, param, group, where)
        if grad is None:
            reason = None if signature is not None and signature.is_taken else "it did before"
        elif self._listed[id(param)] > 1:
            reason = "it is listed twice"
        else:
            reason = unsupported(view, param, grad, group)
        if reason is None:
            self._add_fused(position, param, index, where)
        else:
            self._add_fallback(position, param, index, where, reason)

    def _goes_on(self, param: Tensor, index: int, signature: GradSignature | None) -> bool:
        """Whether a parameter without a gradient stays on the route of its latest one.

        It waits for its next one if anything would have to be refused, or moved.
        """
        view, group, shard = self._view, self._view.groups[index], local(param)
        if signature is None:
            return False
        if signature.param is not None and (
            # it may be frozen meanwhile
            signature.param._replace(requires_grad=shard.requires_grad) != Layout.of(shard)
        ):
            return False
        if not signature.is_taken:
            return True
        (names, _), state = self._facts[index], view.state.get(param, {})
        if unsupported(view, param, param, group) is not None or (
            signature.kind is not None
            and view.rule.rows_unsupported(group, view.options) is not None
        ):
            return False
        if not view.rule.has_state(state):
            return not (names or view.rule.counts_step)
        try:
            check_state_of(view, param, group, "", kernels=True)
        except RuntimeError:
            return False
        return not misplaced(param, state, names)

    def _add_fused(self, position: int, param: Tensor, index: int, where: str) -> None:
        view, group, (names, flags) = self._view, self._view.groups[index], self._facts[index]
        state = view.state.get(param, {})
        shard, grad = local(param), None if param.grad is None else local(param.grad)
        written = [(shard, where)]
        if view.rule.has_state(state):
            check_requested(state, names, flags, where)
            written += check_state_of(view, param, group, where, kernels=True)
            self._misplaced += (
                MisplacedState(param, state, name) for name in misplaced(param, state, names)
            )
        signature = self._signatures[position]
        if grad is not None:
            row_wise = view.rule.is_row_wise(grad, state)
            signature = GradSignature.of(shard, grad, row_wise=row_wise)
            self._signatures[position] = signature
        assert signature is not None
        row_wise, row_state, reordered = signature.kind is not None, None, False
        if row_wise:
            if grad is not None:
                check_row_wise(view.options, grad, group, where)
            row_state = view.rule.row_state
        elif signature.grad is not None:
            order = signature.grad.stride
            agree = strides_agree(shard.shape, shard.stride(), order)
            reordered = signature.grad.is_lazy or not agree
        self._planned[shard.device, is_dtensor(param), row_wise].append(
            PlannedParam(
                position, param, shard, grad, signature, reduce_groups(param), index, flags, names,
                reordered, row_state, where,
            )
        )  # fmt: skip
        (self._written if grad is not None else self._written_later).extend(written)

    def _add_fallback(
        self, position: int, param: Tensor, index: int, where: str, reason: str
    ) -> None:
        view, group, (names, flags) = self._view, self._view.groups[index], self._facts[index]
        grad, state = param.grad, view.state.get(param, {})
        if grad is not None:
            if not view.has_reference:
                raise RuntimeError(
                    f"no kernel can step {where}: {reason}; give Rule.reference, which steps it in "
                    "torch's operations"
                )
            check_fallback(view.options, grad, group, where, reason)
            if view.rule.row_wise is not None:
                view.rule.row_wise.check_fallback(grad, state, where, reason)
            if view.options.is_fused(group):
                _check_insisting(param, where, reason)
            if type(param) in PLAIN_TYPES and view.rule.has_state(state):
                check_requested(state, names, flags, where)
                check_state_of(view, param, group, where, kernels=False)
            plain = all(type(t) in PLAIN_TYPES and t.layout == torch.strided for t in (param, grad))
            layouts = (Layout.of(param), Layout.of(grad)) if plain else (None, None)
            self._signatures[position] = GradSignature(*layouts)
        signature, others = self._signatures[position], self._others
        others.fallback.append(position)
        if signature is not None and signature.param is not None:
            others.strided.append(position)
        else:
            others.other.append((position, index, where))
        if grad is not None and view.rule.eager_state:
            self._misplaced += (
                MisplacedState(param, state, name)
                for name in names
                if name in state and state[name].device != param.device
            )

    def _leave_out_overlapping(self) -> None:
        """Where those without a gradient share memory, let them wait for one."""
        try:
            check_no_overlap([*self._written, *self._written_later])
        except RuntimeError:
            for key, planned in [*self._planned.items()]:
                self._others.without_grad += [p.position for p in planned if p.grad is None]
                self._planned[key] = [p for p in planned if p.grad is not None]
                if not self._planned[key]:
                    del self._planned[key]


def _check_insisting(param: Tensor, where: str, reason: str) -> None:
    message = f"`fused=True` cannot be kept for {where}: {reason}"
    if not param.is_cpu or backend.DEVICE_TYPE == "cpu":
        raise RuntimeError(f"{message}; leave `fused` out and torch's implementation takes it")
    warnings.warn(f"{message}; torch's for-loop steps it", stacklevel=2)
