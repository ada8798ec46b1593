"""How a torch optimizer's `step()` becomes a plan and its launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import runtime
from .gate import Extras, Gate
from .loading import StatefulOptimizer
from .plan import Plan
from .table import Found
from .ways import Group


class FusedStep(StatefulOptimizer):
    """Steps a torch optimizer in one launch; what the kernels cannot take goes torch's own way.

    A class derives from this and from the torch optimizer whose constructor, state and messages it
    keeps, and says what `StatefulOptimizer` leaves open.
    """

    def __init__(self, *args: Any, extras: Extras, **kwargs: Any) -> None:
        self._extras = extras
        super().__init__(*args, **kwargs)
        reasons = [*filter(None, map(self._group_refusal, self.param_groups))]
        if extras.capturable and reasons:
            raise RuntimeError(f"`capturable` does not support {reasons[0]}")

    def _closure_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        enabled = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(self.defaults["differentiable"])
            self._planned_step()
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler would multiply by the old one
                vars(self).pop(name, None)
            raise
        finally:
            torch.set_grad_enabled(enabled)
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_closure_step)

    # A compiled program breaks here: traced, it would fix addresses and recompile by optimizer.
    @_disable_dynamo
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a gradient or a state tensor does not fit its parameter, parameters that a
                kernel would write share memory, or `fused=True` asks for kernels where there are
                none. Nothing has been written then. What torch refuses on its own way it may refuse
                after it has stepped other parameters.
        """
        # torch wraps a step in a profiler's range and a loop over hooks: 9 us where there are none.
        watched = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        )
        if watched and not self._is_wrapped():
            return self._watched_step(*args, **kwargs)
        return self._closure_step(*args, **kwargs)

    def _is_wrapped(self) -> bool:
        """Whether torch has wrapped the class's step: one that overrides ours."""
        step: Any = type(self).step
        while step is not None:
            if getattr(step, "__code__", None) is FusedStep._watched_step.__code__:
                return True
            step = getattr(step, "__wrapped__", None)
        return False

    def _is_overridden(self) -> bool:
        return inspect.unwrap(type(self).step) is not inspect.unwrap(FusedStep.step)

    step.__signature__ = inspect.signature(_closure_step)  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined]

    def _planned_step(self) -> None:
        gate = self._gate()
        self._was_gated |= gate.may_skip
        plan = self._plan
        found = plan.find(self) if plan is not None else None
        if plan is None or found is None:
            if plan is not None and plan.on_gpu and torch.cuda.is_current_stream_capturing():
                self._check_capture(plan, gate, ready=False)
            self._drop_plan()
            plan = Plan(self)
        if plan.on_gpu and torch.cuda.is_current_stream_capturing():
            self._check_capture(plan, gate, ready=found is not None)
            self._captured = (*self._captured, plan)
        if found is None:
            plan.move_strays()
            found = plan.make_tables(self)
        self._gated_step(plan, found, gate)
        if self._plan is None:
            plan.keep(self)
            self._plan = plan

    def _gated_step(self, plan: Plan, found: list[Found], gate: Gate) -> None:
        copies = plan.prepare(found, gate)
        norm = None
        if gate.max_norm is not None:
            norm = plan.norm(gate)
            self._keep_norm(norm, gate)
        rest_happens = True
        if plan.rest:
            rest_happens = gate.does_happen(norm)
            if rest_happens:
                gate.apply([param.grad for param in plan.rest if param.grad is not None], norm)
                self._torch_step({id(param) for param in plan.rest})
        plan.run(found, copies, gate)
        if gate.skip_nonfinite:
            skipped = plan.skipped()
            self._count_skipped(torch.tensor(1.0 - rest_happens) if skipped is None else skipped)

    def _scalars(self, groups: Iterable[Group] | None = None) -> list[float | Tensor]:
        """Every group's hyperparameters, one after another; tensors only where they are on a GPU.

        Args:
            groups: those that stand in for the optimizer's.

        Raises:
            ValueError: a tensor has more elements than one.
        """
        groups = self.param_groups if groups is None else groups
        values = chain.from_iterable(map(self._hyperparameters, groups))
        return [value if type(value) is float else _scalar(value) for value in values]

    def _torch_step(self, rest: set[int]) -> None:
        """torch's own `step()` over the parameters with these ids.

        Unwrapped: hooks have run, and the gradient mode is set. Gradients are unscaled.
        """
        step = inspect.unwrap(super().step)
        groups, told = self.param_groups, vars(self)
        names: list[str] = [name for name in ("grad_scale", "found_inf") if name in told]
        scaler = {name: told.pop(name) for name in names}
        try:
            self.param_groups = [
                {
                    **group,
                    "params": [param for param in group["params"] if id(param) in rest],
                    # torch's fused CPU kernels skip and garble elements; its for-loop does not
                    "fused": None if group.get("fused") is None else False,
                }
                for group in groups
            ]
            step(self)
        finally:
            self.param_groups = groups
            told.update(scaler)

    def _groups_key(self) -> list[tuple[object, ...]]:
        """What decides, beside the tensors, which way they go and which kernel they get."""
        return [
            (
                self._flags(group),
                self._group_refusal(group),
                self._fused(group),
                self._capturable(group),
                self._row_refusal(group),
            )
            for group in self.param_groups
        ]


def _scalar(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"a hyperparameter has {value.numel()} elements; give it one")
        if value.device.type in runtime.CAPTURABLE_DEVICE_TYPES:
            return value
    return float(value)
