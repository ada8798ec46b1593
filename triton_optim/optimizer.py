"""The base of all optimizers: torch's `Optimizer`, stepped in one launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from .launch import backend
from .options import OF_ALL_GRADIENTS, Group, Options, defaults_of, signature
from .rule import Rule
from .step.calls import has_hooks, is_overridden, is_scaled_through_wrapper, is_wrapped
from .step.catch_up import caught_up
from .step.conditions import StepConditions
from .step.fallback import decays, for_torch, make_missing_state, reference_step
from .step.float8 import decoded_states
from .step.loading import (
    adopt_steps,
    check_loaded,
    count_from_here,
    remake_state,
    restore_uncast,
    widen_steps,
)
from .step.remainders import check_counted_apart
from .step.state_validation import check_entries, check_values
from .step.stepper import Stepper
from .step.validation import check_groups, check_rule
from .step.view import OptimizerView
from .tensors.sharding import local


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one kernel launch; what no kernel takes falls back.

    A class has a `rule`. It derives from this alone, and then takes the rule's hyperparameters as
    keyword arguments, or also from the torch optimizer whose constructor, state and messages it
    keeps. Every optimizer takes these keyword arguments too:

    Args:
        params: tensors, dicts of groups or `named_parameters()`; any shape, float32, bfloat16,
            float16, float64, complex64 or complex128.
        fused: True insists on the kernels, and lets a `GradScaler` leave unscaling and skipping to
            them, without waiting for the device. None decides parameter by parameter, and the
            scaler unscales and skips by itself. False takes the fallback.
        foreach, differentiable: of a class that torch has too; True takes torch's implementation.
        capturable: let a CUDA graph capture the step; see the guide. Parameters must be on a GPU.
        max_grad_norm: clip the gradients of a step to this norm, all together, as
            `torch.nn.utils.clip_grad_norm_` would, without writing them. None clips nothing.
        error_if_nonfinite: raise where that norm is infinite or NaN; waits for the device.
        skip_nonfinite: leave everything as it was where that norm is infinite or NaN, and count it
            in `skipped_steps`.
        master_weight_bits: 32 lets bfloat16 parameters have float32 values: they are these,
            rounded, and the state has the other 16 bits as `param_remainder`. State is float32.
        stochastic_rounding: True rounds parameters and state of 16 bits to either neighbour, right
            in the mean; every parameter's state then has `step`. False rounds all to nearest. None
            does so but for state of 16 bits that `state_dtype` asks for.
        rounding_seed: of the random numbers, which depend on it, on a parameter's place in the
            groups, its step, and the place of an element in the whole tensor: on nothing else.
        state_dtype: float32, bfloat16, float16 or "8bit", in which state of the parameters' shape
            is kept, or a dict of them by name. None keeps it as torch does, in the parameter's.
            8 bits are floating point with an exponent for each 256 elements.

    Raises:
        TypeError: an argument that there is not.
        ValueError: an option that is for the whole optimizer in a group, or options that exclude
            one another or do nothing.
        RuntimeError: `fused` with `foreach` or with `differentiable`.

    Example:
        >>> class Lion(FusedOptimizer):
        ...     rule = Rule(lion_rule, state=("exp_avg",), hyperparameters={"lr": 1e-4, ...})
        >>> optimizer = Lion(model.parameters(), lr=3e-4, max_grad_norm=1.0)
    """

    rule: Rule
    _stepper: Stepper
    _torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None  # from which it also derives
    _without_options: ClassVar = frozenset({"sparse", "decoupled_weight_decay"})

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        torchs, rule = self._torch_class, getattr(type(self), "rule", None)
        if not isinstance(rule, Rule):
            raise TypeError(
                f"{type(self).__name__} has no rule; give it a Rule as a class attribute"
            )
        taken = inspect.signature(torchs.__init__).parameters if torchs is not None else {}
        excluded = {*self._without_options, *taken}
        names = [field.name for field in fields(Options) if field.name not in excluded]
        given = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        self._stepper = Stepper(Options(**given), frozenset(names))
        if torchs is not None:
            super().__init__(params, *args, **kwargs)
        else:
            super().__init__(params, defaults_of(type(self), rule.hyperparameters, args, kwargs))
        if self._stepper.options.fused:  # which torch's class does not take
            if self.defaults.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if self.defaults.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        check_rule(rule, self.param_groups, backend.flag_names())
        # So that type(optimizer)(params, **optimizer.defaults) makes another one like it.
        self.defaults.update({name: getattr(self._stepper.options, name) for name in names})
        reasons = [*filter(None, map(self._stepper.options.unsupported, self.param_groups))]
        if self._stepper.options.capturable and reasons:
            raise RuntimeError(f"`capturable` does not support {reasons[0]}")
        kept = {name for group in self.param_groups for name in rule.state_names(group)}
        self._stepper.options.check_used(self._fused_view().params, kept)
        if rule.eager_state:
            remake_state(self._fused_view(), self.param_groups)
        adopt_steps(self._fused_view(), replaces=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        after = cls.__mro__[cls.__mro__.index(FusedOptimizer) + 1 :]
        base = next(base for base in after if issubclass(base, torch.optim.Optimizer))
        cls._torch_class = None if base is torch.optim.Optimizer else base
        constructor: Any = cls.__init__
        more: Mapping[str, object] = {}
        if constructor is FusedOptimizer.__init__:
            rule = getattr(cls, "rule", None)
            known = rule.hyperparameters if isinstance(rule, Rule) else {}
            constructor = base.__init__ if cls._torch_class is not None else None
            more = {"fused": None} if callable(known) else known
        cls.__signature__ = signature(  # type: ignore[attr-defined]
            constructor, more, cls._without_options
        )

    def _current_rule(self) -> Rule:
        """The class's; an option may choose another."""
        rule, options = type(self).rule, self._stepper.options
        rule = rule.decoupled if options.decoupled_weight_decay else rule
        return rule.counting if options.may_round else rule

    def _fused_view(
        self,
        groups: list[Group] | None = None,
        state: Any = None,
        stepper: Stepper | None = None,
    ) -> OptimizerView:
        """What the layers below see of it, or of some of its parameters."""
        stepper, rule = stepper or self._stepper, self._current_rule()
        return OptimizerView(
            rule,
            self.param_groups if groups is None else groups,
            self.state if state is None else state,
            self.defaults,
            stepper.options,
            stepper.option_names,
            stepper.counters,
            stepper.may_skip,
            rule.reference is not None or self._torch_class is not None,
            stepper.remainders,
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: the group has an option that is for the whole optimizer, or does not go with
                the optimizer's options.
        """
        of_torch = self.defaults.keys() - self._stepper.option_names
        repeated = self._stepper.options.repeated_by(param_group)  # by ZeroRedundancyOptimizer
        if misplaced := sorted((Options.OF_THE_WHOLE & param_group.keys()) - of_torch - repeated):
            option, name = misplaced[0], type(self).__name__
            taken = option in self._stepper.option_names
            remedy = f"{name} takes none; leave it out"
            if taken:
                remedy = f"give it to {name}(params, ...)"
            if option in OF_ALL_GRADIENTS:
                remedy += ". Under ZeroRedundancyOptimizer, which puts it there, clip before a step"
            raise ValueError(f"{option} is for the whole optimizer and not for a group; {remedy}")
        from_defaults = self._stepper.option_names - (param_group.keys() - repeated)
        super().add_param_group(param_group)
        for name in from_defaults:
            param_group.pop(name, None)  # groups are torch's, and so are state dicts
        try:
            group, rule, options = (
                self.param_groups[-1],
                self._current_rule(),
                self._stepper.options,
            )
            options.check_params(group["params"])
            rule.check_state_dtypes(group, options)
            rule.check_group(group, options)
            if options.master_weight_bits is not None:
                check_counted_apart((p.param, p.where) for p in self._fused_view().named())
        except (ValueError, RuntimeError):
            del self.param_groups[-1]
            raise

    def _step_with_closure(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fused_step()
        return loss

    def _fused_step(
        self,
        groups: list[Group] | None = None,
        state: Any = None,
        stepper: Stepper | None = None,
    ) -> None:
        """Step its groups, or some of its parameters."""
        enabled = torch.is_grad_enabled()
        attributes = vars(self) if stepper is None else {}  # a GradScaler tells of all parameters
        stepper = stepper or self._stepper
        try:
            torch.set_grad_enabled(self.defaults.get("differentiable", False))
            conditions = StepConditions.read(attributes, stepper.options)
            stepper.may_skip |= conditions.may_skip
            view = self._fused_view(groups, state, stepper)
            stepper.step(view, conditions, self._fused_fallback, type(self).__name__)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler would multiply by the old one
                attributes.pop(name, None)
            raise
        finally:
            torch.set_grad_enabled(enabled)

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step_with_closure)

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
                none. Nothing has been written then. If torch's implementation raises, other
                parameters that fall back to it may be updated already.
        """
        # torch wraps a step in a profiler's range and a loop over hooks: 9 us where there are none.
        hooked = FusedOptimizer._hooked_step
        if (has_hooks(self) or _profiler_enabled()) and not is_wrapped(self, hooked):
            return self._hooked_step(*args, **kwargs)
        return self._step_with_closure(*args, **kwargs)

    step.__signature__ = inspect.signature(_step_with_closure)  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined]

    def _is_overridden(self) -> bool:
        return is_overridden(self, FusedOptimizer.step)

    def _fused_fallback(self, view: OptimizerView, params: Iterable[Tensor]) -> None:
        """Step these parameters with torch's implementation, or the rule's reference.

        Gradients are unscaled. torch's step is unwrapped: hooks have run, and the gradient mode is
        set.
        """
        step, ids = inspect.unwrap(super().step), {*map(id, params)}
        groups = [for_torch(group, ids) for group in view.groups]
        if self._torch_class is None:
            reference_step(view, groups)
            return
        if view.rule.eager_state:
            make_missing_state(view, groups)
        decayed = decays(view, groups) if view.options.decoupled_weight_decay else []
        # Another one with the same attributes: buckets of other devices may step meanwhile.
        part = object.__new__(type(self))
        vars(part).update(vars(self), param_groups=groups, state=view.state)
        for name in ("grad_scale", "found_inf"):
            vars(part).pop(name, None)
        step(part)
        for param, amount in decayed:
            param.sub_(amount)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, in torch's format; see `torch.optim.Optimizer.state_dict`.

        Rows that were left out of steps are brought up to date first, and their last step is not in
        it. State of 8 bits becomes bfloat16, which has all its values. What it returns is of this
        step then: save it, or load it, before the next one.

        Raises:
            RuntimeError: state of such rows does not fit its parameter, or no kernel runs there.
        """
        view, state = self._fused_view(), self.state
        view.drop_stale_remainders()
        rows = view.rule.row_wise
        if self._stepper.plan is not None:
            self._stepper.plan.forget_skipped(view)

        def show(_: torch.optim.Optimizer) -> None:
            if rows is not None and rows.lazy is not None:
                self.state = caught_up(view, self._stepper.lazy_values or [])
            elif view.options.has_eight_bits:
                self.state = decoded_states(view)

        last = self.register_state_dict_pre_hook(show)  # others may write to the state
        try:
            return super().state_dict()
        finally:
            last.remove()
            self.state = state

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
        keep = self.register_load_state_dict_pre_hook(_keep_for_setstate)
        try:
            super().load_state_dict(state_dict)
        except BaseException as error:
            self.param_groups, self.state = groups, state
            if isinstance(error, NotImplementedError):  # torch cannot copy from the meta device
                check_values(state_dict["state"])
            raise
        finally:
            keep.remove()
            vars(self).pop("_loaded", None)

    def __getstate__(self) -> dict[str, Any]:
        stepper, view = self._stepper, self._fused_view()
        view.drop_stale_remainders()
        if stepper.plan is not None:
            stepper.plan.forget_skipped(view)
        kept = Stepper(stepper.options, stepper.option_names)
        kept.skipped, kept.lazy_values = stepper.skipped, stepper.lazy_values
        return {**super().__getstate__(), "_stepper": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loads = "defaults" not in state  # by load_state_dict; a copy brings everything
        names = (self._stepper if loads else state["_stepper"]).option_names
        if "fused" in (self.defaults if loads else state["defaults"]) and "fused" not in names:
            for group in state["param_groups"]:
                group.setdefault("fused", None)  # torch sets False, which would refuse the kernels
        if loads:
            view = self._fused_view(state["param_groups"], state["state"])
            if view.rule.counts_step and not type(self).rule.counts_step:
                count_from_here(view)
            check_entries(view.rule, state["state"], view.groups)
            if "_loaded" in vars(self):
                restore_uncast(view, vars(self)["_loaded"])
        super().__setstate__(state)
        if self._torch_class is None:
            self.defaults.pop("differentiable", None)  # torch adds it to any defaults
        self._stepper.plan = None
        if loads:
            check_groups(self.param_groups, self.defaults.keys() - names)
            check_loaded(self._fused_view())
        adopt_steps(self._fused_view(), replaces=loads)
        widen_steps(self._fused_view())
        if loads:
            self._stepper.remainders.forget()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and skipping to the step.

        As with torch, `fused=True` asks for it. Not where no kernel runs, nor where something
        stands between the scaler and the step, which would see scaled gradients, or take the step's
        call for a step: a hook, another `step`, a wrapper to which the scaler was given.
        """
        options = self._stepper.options
        return (
            self._stepper.amp_scaling
            and all(options.is_fused(g) and not options.unsupported(g) for g in self.param_groups)
            and any(local(p).device.type == backend.DEVICE_TYPE for p in self._fused_view().params)
            and not has_hooks(self)
            and not self._is_overridden()
            and not is_scaled_through_wrapper(self)
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        self._stepper.amp_scaling = supports

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which a step clips its gradients, all of them together; None for none.

        May be set between steps.

        Raises:
            ValueError: set to something negative or to NaN.
        """
        return self._stepper.options.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_norm: float | None) -> None:
        stepper = self._stepper
        before = stepper.options.max_grad_norm
        stepper.options = replace(stepper.options, max_grad_norm=max_norm)
        self.defaults["max_grad_norm"] = stepper.options.max_grad_norm
        if (before is None) != (max_norm is None):
            stepper.drop_plan(self._fused_view())

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, on the device: [].

        float64 where a parameter is, otherwise float32. Of unscaled gradients under a GradScaler;
        over all ranks where parameters are DTensors. None without `max_grad_norm` and before the
        first step.
        """
        norm = self._stepper.norm
        if norm is None or self.max_grad_norm is None:
            return None
        dtypes = (param.dtype for param in self._fused_view().params)
        double = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
        return norm.to(torch.float64 if double else torch.float32, copy=True)

    @property
    def skipped_steps(self) -> Tensor | None:
        """How many steps `skip_nonfinite=True` has skipped, on the device: int64 []; None without.

        Those count too that a GradScaler skipped.
        """
        if not self._stepper.options.skip_nonfinite:
            return None
        skipped = self._stepper.skipped
        return torch.zeros(()).long() if skipped is None else skipped.long()


def _keep_for_setstate(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """A hook that runs after all others."""
    vars(optimizer)["_loaded"] = state_dict
