"""How a torch optimizer's `step()` becomes a plan and its launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .checks import (
    check_apart,
    check_entries,
    check_groups,
    check_shapes,
    check_state,
    check_step,
    check_values,
    describe,
)
from .plan import Plan
from .ways import PLAIN_TYPES, Group, State, group_refusal, refusal


class FusedStep(torch.optim.Optimizer):
    """Steps a torch optimizer in one launch; what the kernels cannot take goes torch's own way.

    A class derives from this and from the torch optimizer whose constructor, state and messages it
    keeps, and says what the members below leave open.
    """

    _rule: str  # its name in kernels/rules.py
    _counts_steps = True  # state has a `step`
    _step_flags: frozenset[str] = frozenset()  # flags under which the rule reads the step
    _state_follows_parameter = False  # state on another device is moved, not refused

    _plan: Plan | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # torch sets it under `fused`. GradScaler then unscales and skips by itself.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = "defaults" not in state  # by load_state_dict; a copy brings everything
        for group in state["param_groups"]:
            group.setdefault("fused", None)
        if loaded:
            groups, counts = state["param_groups"], self._counts_steps
            check_entries(state["state"], groups, counts_steps=counts)
        super().__setstate__(state)
        self._plan = None
        if loaded:
            check_groups(self.param_groups, self.defaults)
            self._check_states()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer over the same parameters, torch's or this one.

        Args:
            state_dict: what `state_dict()` returned. Its groups replace this optimizer's.

        Raises:
            ValueError: the groups differ in number or size.
            RuntimeError: a state tensor or a hyperparameter is missing, or does not fit its
                parameter. The optimizer is as it was then, as after any exception of a hook.
        """
        groups, state = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
        except BaseException as error:
            self.param_groups, self.state = groups, state
            if isinstance(error, NotImplementedError):  # torch cannot copy from the meta device
                check_values(state_dict["state"])
            raise

    def _flags(self, group: Group) -> frozenset[str]:
        """Names of the rule's flags that a parameter group sets."""
        raise NotImplementedError

    def _hyperparameters(self, group: Group) -> tuple[float | Tensor, ...]:
        """The rule's `hyper`: floats in double precision, or one-element tensors."""
        raise NotImplementedError

    def _state_names(self, group: Group) -> tuple[str, ...]:
        """Keys of the tensors that the rule updates, in its order."""
        raise NotImplementedError

    def _new_state(self, param: Tensor, group: Group) -> State:
        """The state of a parameter before its first update, keys in torch's order."""
        raise NotImplementedError

    def _new_step(self, param: Tensor, group: Group) -> Tensor:
        """A step counter at 0, where torch keeps it."""
        if group["fused"]:
            return torch.zeros((), dtype=torch.float32, device=param.device)
        double = torch.get_default_dtype() == torch.float64
        return torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")

    def _has_state(self, state: State) -> bool:
        """Whether a parameter with this state has been set up."""
        return bool(state)

    def _check_states(self) -> None:
        """Refuse loaded state with which a step would fail."""
        written: list[tuple[Tensor, str]] = []
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                state = self.state.get(param, {})
                foreign = any(isinstance(value, Tensor) for value in state.values())
                if type(param) not in PLAIN_TYPES or not (self._has_state(state) or foreign):
                    continue
                kernels = not (group_refusal(group) or refusal(param, param))
                where = describe(group, index, position)
                written += self._check_state(param, group, where, kernels=kernels)
        check_apart(written)

    def _check_state(
        self, param: Tensor, group: Group, where: str, *, kernels: bool
    ) -> list[tuple[Tensor, str]]:
        """Refuse bad state. Returns the tensors that the kernels will write, with their names."""
        state, names = self.state[param], self._state_names(group)
        check_shapes(param, state, names, where)
        if not kernels:
            return []
        check_state(param, state, names, where, follows=self._state_follows_parameter)
        if self._counts_steps:
            check_step(state, where)
        return [(state[name], f"state {name!r} of {where}") for name in names]

    def _closure_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        enabled = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(self.defaults["differentiable"])
            self._planned_step()
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

    step.__signature__ = inspect.signature(_closure_step)  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined]

    def _planned_step(self) -> None:
        plan = self._plan
        found = plan.find(self) if plan is not None else None
        if plan is None or found is None:
            self._plan = None
            plan = Plan(self)
        if plan.on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step() was called under CUDA graph capture: a replay would "
                "repeat this step's rates and addresses; pass fused=False"
            )
        if found is None:
            plan.move_strays()
            found = plan.prepare(self)
        if plan.rest:
            self._torch_step({id(param) for param in plan.rest})
        plan.run(found)
        if self._plan is None:
            plan.keep(self)
            self._plan = plan

    def _scalars(self) -> list[float | Tensor]:
        """Every group's hyperparameters, one after another; tensors only where they are on a GPU.

        Raises:
            ValueError: a tensor has more elements than one.
        """
        values = chain.from_iterable(map(self._hyperparameters, self.param_groups))
        return [value if type(value) is float else _scalar(value) for value in values]

    def _torch_step(self, rest: set[int]) -> None:
        """torch's own `step()` over the parameters with these ids.

        Unwrapped: hooks have run, and the gradient mode is set.
        """
        step = inspect.unwrap(super().step)
        groups = self.param_groups
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

    def _groups_key(self) -> list[tuple[object, ...]]:
        """What decides, beside the tensors, which way they go and which kernel they get."""
        return [
            (self._flags(group), group_refusal(group), group.get("fused"))
            for group in self.param_groups
        ]


def _scalar(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"a hyperparameter has {value.numel()} elements; give it one")
        if not value.is_cpu:
            return value
    return float(value)
