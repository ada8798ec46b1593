"""How a torch optimizer's `step()` becomes a plan and its launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.optim import lr_scheduler

from .gated import Internals
from .launch import backend
from .loading import StatefulOptimizer
from .step.conditions import Extras, Gate
from .step.launch_group import Found
from .step.plan import Plan
from .step.routing import Group, is_traced


class FusedStep(StatefulOptimizer):
    """Steps a torch optimizer in one launch; what the kernels cannot take goes torch's own way.

    A class derives from this and from the torch optimizer whose constructor, state and messages it
    keeps, and says what `StatefulOptimizer` leaves open.
    """

    def __init__(self, *args: Any, options: Mapping[str, Any], **kwargs: Any) -> None:
        self._internals = Internals(Extras(**options), frozenset(options))
        super().__init__(*args, **kwargs)
        # So that type(optimizer)(params, **optimizer.defaults) makes another one like it.
        self.defaults.update({name: getattr(self._extras, name) for name in options})
        reasons = [*filter(None, map(self._group_refusal, self.param_groups))]
        if self._extras.capturable and reasons:
            raise RuntimeError(f"`capturable` does not support {reasons[0]}")
        self._adopt_steps(replaces=False)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: the group has an option that is for the whole optimizer.
        """
        if misplaced := sorted(Extras.OF_THE_WHOLE & param_group.keys()):
            raise ValueError(
                f"{misplaced[0]} is for the whole optimizer and not for a group; give it to "
                f"{type(self).__name__}(params, ...)"
            )
        from_defaults = self._internals.options - param_group.keys()
        super().add_param_group(param_group)
        for name in from_defaults:
            param_group.pop(name, None)  # groups are torch's, and so are state dicts

    def _closure_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        enabled = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(self.defaults.get("differentiable", False))
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
            TypeError: a hyperparameter is no number.
            RuntimeError: a gradient or a state tensor does not fit its parameter, parameters that a
                kernel would write share memory, or `fused=True` asks for kernels where there are
                none. Nothing has been written then. What torch refuses on its own way it may refuse
                after it has stepped other parameters.
        """
        # torch wraps a step in a profiler's range and a loop over hooks: 9 us where there are none.
        if (self._hooks or _profiler_enabled()) and not self._is_wrapped():
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
        step: Any = vars(self).get("step", type(self).step)
        # A scheduler's patch only tells it that the step was called.
        while getattr(step, "__globals__", None) is vars(lr_scheduler):
            step = step.__wrapped__
        return type(self).step is not FusedStep.step or (
            getattr(step, "__func__", step) is not FusedStep.step
        )

    step.__signature__ = inspect.signature(_closure_step)  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined]

    def _planned_step(self) -> None:
        gate, internals, traced = self._gate(), self._internals, is_traced()
        internals.may_skip |= gate.may_skip
        if traced:
            self._drop_plan()  # the one that is made now is of nothing that lasts
        plan = internals.plan
        found = plan.find(self) if plan is not None else None
        if plan is None or found is None:
            if plan is not None and plan.is_captured():
                self._check_capture(plan, gate, ready=False)
            self._drop_plan()
            plan = Plan(self, plan)
        if plan.is_captured():
            self._check_capture(plan, gate, ready=found is not None and plan.is_prepared(gate))
            internals.captured = (*internals.captured, plan)
        if found is None:
            plan.move_strays()
            found = plan.make_tables(self)
        self._gated_step(plan, found, gate)
        if internals.plan is None and not traced:
            plan.keep(self)
            internals.plan = plan

    def _gated_step(self, plan: Plan, found: list[Found], gate: Gate) -> None:
        copies = plan.prepare(found, gate)
        rest = plan.rest(self)
        norm = None
        if gate.max_norm is not None:
            norm = plan.norm(rest, gate)
            self._keep_norm(norm, gate)
        rest_happens = True
        if rest:
            rest_happens = gate.does_happen(norm)
            if rest_happens:
                gate.apply([param.grad for param in rest if param.grad is not None], norm)
                self._torch_step({id(param) for param in rest})
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

    def _check_hyperparameters(self) -> None:
        """Refuse values in groups that only look like numbers.

        Raises:
            TypeError: there is one, such as a learning rate that is a string.
        """
        numbers = [
            name
            for name, value in self.defaults.items()
            if isinstance(value, Real | Tensor) and not isinstance(value, bool)
        ]
        for index, group in enumerate(self.param_groups):
            for name in numbers:
                if not hasattr(group.get(name, 0), "__float__"):
                    raise TypeError(
                        f"{name} of group {index} is {group[name]!r}; give it a number, or a "
                        "tensor of one element"
                    )

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
        if value.device.type in backend.CAPTURABLE_DEVICE_TYPES:
            return value
    return float(value)
