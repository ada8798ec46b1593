"""Makes a plan: checks every parameter, and chooses between the kernels and the fallback."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..launch import backend
from ..launch.chunking import GradSignature, PlannedParam
from ..rule import State
from ..storage import REMAINDER
from ..tensors.layout import Layout, strides_agree
from ..tensors.sharding import PLAIN_TYPES, is_dtensor, local, redistribute_grad, reduce_groups
from .capture import check_capturable
from .dense import DenseLaunchGroup
from .plan import Others, Plan, Values
from .routing import is_traced, laid_out_like, misplaced, unsupported
from .row_wise import RowWiseLaunchGroup
from .state import check_state_of
from .state_validation import check_requested
from .validation import (
    check_fallback,
    check_indices,
    check_meshes,
    check_no_overlap,
    check_row_wise,
    check_tensors,
)
from .view import NamedParam, OptimizerView

Named = list[tuple[Tensor, str]]  # tensors, each with its description
# Of what may stand between `_warn` and the program.
BETWEEN = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


@contextlib.contextmanager
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
        previous: the plan before, which knows parameters that have no gradient now.
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
        self._misplaced: list[tuple[Tensor, State, str]] = []
        self._written: Named = []
        self._written_later: Named = []  # once there is a gradient again
        self._facts = [(view.rule.state_names(g), view.rule.active_flags(g)) for g in view.groups]
        self._listed = Counter(map(id, params))
        self._unkept: list[str] = []  # parameters for which `fused=True` is not, with the reason
        for item in view.named():
            self._add(item)
        check_no_overlap(self._written)
        if self._written_later:
            self._leave_out_overlapping()
        if view.options.max_grad_norm is not None:
            check_meshes(param for param in params if param.grad is not None)
        self._values = Values(view, uses_kernels=bool(self._planned))
        if self._unkept:
            _warn(self._unkept)

    @property
    def gpus(self) -> set[torch.device]:
        """Where kernels would run."""
        devices = {device for device, *_ in self._planned}
        return {gpu for gpu in devices if gpu.type in backend.CAPTURABLE_DEVICE_TYPES}

    @_gc_paused()
    def finish(self) -> Plan:
        """Bring state to its place, make what is missing, and the launches."""
        view, n_hypers = self._view, len(self._values.hyperparameters)
        for param, state, name in self._misplaced:
            state[name] = laid_out_like(param, state[name])
        launch_groups = [
            (RowWiseLaunchGroup if row_wise else DenseLaunchGroup)(view, device, planned, n_hypers)
            for (device, _, row_wise), planned in self._planned.items()
        ]
        self._others.watch(self._signatures, view.params)
        return Plan(view, launch_groups, self._others, self._signatures, self._values)

    def _add(self, item: NamedParam) -> None:
        view, param, group = self._view, item.param, item.group
        redistribute_grad(param)
        grad, signature = param.grad, self._signatures[item.position]
        if grad is None and not self._goes_on(item, signature):
            self._others.without_grad.append(item.position)
            return
        if grad is not None:
            check_tensors(param, grad, item.where)
            if grad.layout == torch.sparse_coo and not is_traced():
                check_indices(grad._indices(), param.shape, item.where)
        check_capturable(view.options, param, group, item.where)
        if grad is None:
            reason = None if signature is not None and signature.is_taken else "it did before"
        elif self._listed[id(param)] > 1:
            reason = "it is listed twice"
        else:
            reason = unsupported(view, param, grad, group)
        if reason is None:
            self._add_fused(item)
        else:
            self._add_fallback(item, reason)

    def _goes_on(self, item: NamedParam, signature: GradSignature | None) -> bool:
        """Whether a parameter without a gradient stays on the route of its latest one.

        It waits for its next one if anything would have to be refused, or moved.
        """
        view, param, group = self._view, item.param, item.group
        shard = local(param)
        if signature is None:
            return False
        if signature.param is not None and (
            # it may be frozen meanwhile
            signature.param._replace(requires_grad=shard.requires_grad) != Layout.of(shard)
        ):
            return False
        if not signature.is_taken:
            return True
        (names, _), state = self._facts[item.group_index], view.state.get(param, {})
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
        return not misplaced(param, state, _held(state, names))

    def _add_fused(self, item: NamedParam) -> None:
        view, param, where = self._view, item.param, item.where
        (names, flags), state = self._facts[item.group_index], view.state.get(param, {})
        shard, grad = local(param), None if param.grad is None else local(param.grad)
        beside, written = view.options.names_beside(param, names), [(shard, where)]
        if view.rule.has_state(state):
            check_requested(state, names, flags, where)
        if view.rule.has_state(state) or (REMAINDER in beside and REMAINDER in state):
            written += check_state_of(view, param, item.group, where, kernels=True)
            held = _held(state, names)
            self._misplaced += ((param, state, name) for name in misplaced(param, state, held))
        signature = self._signatures[item.position]
        if grad is not None:
            row_wise = view.rule.is_row_wise(grad, state)
            signature = GradSignature.of(shard, grad, row_wise=row_wise)
            self._signatures[item.position] = signature
        assert signature is not None
        row_wise, reordered = signature.kind is not None, False
        if row_wise and grad is not None:
            check_row_wise(view.options, param, grad, item.group, names, where)
        elif signature.grad is not None:
            agree = strides_agree(shard.shape, shard.stride(), signature.grad.stride)
            reordered = signature.grad.is_lazy or not agree
        self._planned[shard.device, is_dtensor(param), row_wise].append(
            PlannedParam(
                item.position, param, shard, grad, signature, reduce_groups(param),
                item.group_index, flags, names, reordered,
                view.rule.row_state if row_wise else None, beside, item.place, where,
            )
        )  # fmt: skip
        (self._written if grad is not None else self._written_later).extend(written)

    def _add_fallback(self, item: NamedParam, reason: str) -> None:
        view, param, group, where = self._view, item.param, item.group, item.where
        names, flags = self._facts[item.group_index]
        grad, state = param.grad, view.state.get(param, {})
        if grad is not None:
            if not view.has_reference:
                raise RuntimeError(
                    f"no kernel can step {where}: {reason}; give Rule.reference, which steps it in "
                    "torch's operations"
                )
            check_fallback(view.options, param, grad, group, names, where, reason)
            if view.rule.row_wise is not None:
                view.rule.row_wise.check_fallback(grad, state, where, reason)
            if view.options.is_fused(group):
                self._insist(param, f"{where}: {reason}")
            if type(param) in PLAIN_TYPES and view.rule.has_state(state):
                check_requested(state, names, flags, where)
                check_state_of(view, param, group, where, kernels=False)
            plain = all(type(t) in PLAIN_TYPES and t.layout == torch.strided for t in (param, grad))
            layouts = (Layout.of(param), Layout.of(grad)) if plain else (None, None)
            self._signatures[item.position] = GradSignature(*layouts)
        signature, others = self._signatures[item.position], self._others
        others.fallback.append(item.position)
        if signature is not None and signature.param is not None:
            others.strided.append(item.position)
        else:
            others.other.append((item.position, item.group_index, where))
        if grad is not None and view.rule.eager_state:
            self._misplaced += (
                (param, state, name)
                for name in names
                if name in state and state[name].device != param.device
            )

    def _insist(self, param: Tensor, why: str) -> None:
        """Where there are no kernels, a warning will do."""
        if not param.is_cpu or backend.DEVICE_TYPE == "cpu":
            raise RuntimeError(
                f"`fused=True` cannot be kept for {why}; leave `fused` out and torch's "
                "implementation takes it"
            )
        self._unkept.append(why)

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


def _held(state: State, names: Iterable[str]) -> list[str]:
    """Of these states, and of the remainder, those that there are."""
    return [name for name in (*names, REMAINDER) if name in state]


def _warn(unkept: Sequence[str]) -> None:
    """That `fused=True` is not kept for these parameters: once, where the program made the step."""
    first, _, reason = unkept[0].partition(": ")
    more, them = (f" and {len(unkept) - 1} more", "them") if len(unkept) > 1 else ("", "it")
    message = f"`fused=True` cannot be kept for {first}{more}: {reason}; torch's for-loop steps"
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{message} {them}", stacklevel=level)
