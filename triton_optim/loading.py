"""What an optimizer class says about its rule and state, and how state is loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .gated import GatedOptimizer, Internals
from .step.routing import Group, State, is_traced, refusal
from .step.validation import (
    check_apart,
    check_entries,
    check_groups,
    check_row_state,
    check_shapes,
    check_state,
    check_step,
    check_values,
    describe,
)
from .tensors.sharding import PLAIN_TYPES, local


class StatefulOptimizer(GatedOptimizer):
    """A torch optimizer whose state is checked when it is loaded."""

    _rule: str  # its name in kernels/rules.py
    _counts_steps = True  # state has a `step`
    _step_flags: frozenset[str] = frozenset()  # flags under which the rule reads the step
    _state_follows_parameter = False  # state on another device is moved, not refused
    _row_rule: str | None = None  # for updates by rows, if that is another
    _row_state: str | None = None  # name of the state that has one number a row
    _loaded: dict[str, Any] | None = None  # while a state dict is loaded
    _rows_read_step = False  # whether that rule reads the step whatever the flags

    def __getstate__(self) -> dict[str, Any]:
        internals = self._internals
        if internals.plan is not None:
            internals.plan.forget_skipped(self)
        kept = Internals(internals.extras, internals.options)
        kept.skipped, kept.alphas = internals.skipped, internals.alphas
        return {**super().__getstate__(), "_internals": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = "defaults" not in state  # by load_state_dict; a copy brings everything
        options = (self._internals if loaded else state["_internals"]).options
        if "fused" in (self.defaults if loaded else state["defaults"]) and "fused" not in options:
            for group in state["param_groups"]:
                group.setdefault("fused", None)  # torch sets False, which would refuse the kernels
        if loaded:
            groups, counts = state["param_groups"], self._counts_steps
            check_entries(state["state"], groups, counts_steps=counts)
            self._restore_row_states(groups, state["state"])
        super().__setstate__(state)
        self._internals.plan = None
        if loaded:
            check_groups(self.param_groups, self.defaults.keys() - options)
            self._check_states()
        self._adopt_steps(replaces=loaded)

    def _adopt_steps(self, *, replaces: bool) -> None:
        """Put the step counts of new state where one operation counts them all.

        Not those in shared memory, in which other processes count too.

        Args:
            replaces: whether the state gets other tensors, and a checkpoint keeps its own.
        """
        if not self._counts_steps or is_traced():
            return
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                step = state.get("step")
                if _is_private(step):
                    new = self._new_step(param, group, step.dtype).copy_(step.view(()))
                    if replaces:
                        state["step"] = new
                    else:
                        step.data = new.view(step.shape)

    def _restore_row_states(self, groups: Sequence[Group], states: Mapping[Tensor, State]) -> None:
        """Load the state of rows once more: torch cast it to its parameter's dtype."""
        name, loaded = self._row_state, self._loaded
        if name is None or loaded is None:
            return
        ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = chain.from_iterable(group["params"] for group in groups)
        for key, param in zip(ids, params, strict=True):
            value = loaded["state"].get(key, {}).get(name)
            if isinstance(value, Tensor) and param in states:
                states[param][name] = value.to(param.device, self._row_dtype(param))

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

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, in torch's format; see `torch.optim.Optimizer.state_dict`."""
        if (plan := self._internals.plan) is not None:
            plan.forget_skipped(self)
        return super().state_dict()

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

    def _new_step(self, param: Tensor, group: Group, dtype: torch.dtype | None = None) -> Tensor:
        """A step counter at 0, where torch keeps it.

        Args:
            dtype: another than torch's.
        """
        device = torch.device("cpu")
        if self._fused(group) or self._capturable(group) or self._extras.skip_nonfinite:
            device, dtype = param.device, dtype or torch.float32
        dtype = dtype or step_dtype()
        if device.type != "cpu":
            return torch.zeros((), dtype=dtype, device=device)
        return self._internals.steps.take(dtype, self._n_params)

    def _n_params(self) -> int:
        return sum(len(group["params"]) for group in self.param_groups)

    def _by_rows(self, grad: Tensor, state: State) -> bool:
        """Whether a parameter with this state is updated by rows."""
        return grad.layout == torch.sparse_coo

    def _row_refusal(self, group: Group) -> str | None:
        """Why the kernels cannot update a group by rows, or None."""
        raise NotImplementedError

    def _row_dtype(self, param: Tensor) -> torch.dtype:
        """That of the state that has one number a row."""
        raise NotImplementedError

    def _new_row_state(self, param: Tensor, state: State) -> Tensor:
        """It, of a parameter whose state has none yet."""
        raise NotImplementedError

    def _has_row_state(self, state: State) -> bool:
        """Whether a parameter with this state has it."""
        return self._row_state is not None

    def _refusal(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        """Why a parameter goes torch's way, or None."""
        if reason := self._group_refusal(group):
            return reason
        by_rows = self._by_rows(grad, self.state.get(param, {}))
        if by_rows and (reason := self._row_refusal(group)):
            return reason
        return refusal(param, grad, by_rows=by_rows)

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
                kernels = not self._refusal(param, param, group)
                where = describe(group, index, position)
                written += self._check_state(param, group, where, kernels=kernels)
        check_apart(written)

    def _check_state(
        self, param: Tensor, group: Group, where: str, *, kernels: bool
    ) -> list[tuple[Tensor, str]]:
        """Refuse bad state. Returns the tensors that the kernels will write, with their names."""
        state, names = self.state[param], self._state_names(group)
        check_shapes(param, state, names, where)
        if self._row_state is not None and self._has_row_state(state):
            check_row_state(param, state, self._row_state, self._row_dtype(param), where)
            names = (*names, self._row_state)
        if not kernels:
            return []
        check_state(
            param, state, self._state_names(group), where, follows=self._state_follows_parameter
        )
        if self._counts_steps:
            check_step(state, where)
        return [(local(state[name]), f"state {name!r} of {where}") for name in names]


def step_dtype() -> torch.dtype:
    """That in which torch counts steps on the CPU."""
    double = torch.get_default_dtype() == torch.float64
    return torch.float64 if double else torch.float32


def _is_private(step: object) -> TypeGuard[Tensor]:
    """Whether it is a counter on the CPU that is in no other process."""
    return (
        type(step) is Tensor
        and step.dtype in (torch.float32, torch.float64)
        and step.numel() == 1
        and step.is_cpu
        and not step.is_shared()
    )


def _keep_for_setstate(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """A hook that runs after all others."""
    vars(optimizer)["_loaded"] = state_dict
