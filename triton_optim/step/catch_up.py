"""Brings rows up to date that were left out of steps, before what they missed is forgotten."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..launch.chunking import GradSignature, PlannedParam
from ..rule import State
from .routing import laid_out_like, misplaced, tensors_unsupported
from .row_wise import RowWiseLaunchGroup
from .state import check_state_of, step_dtype
from .view import OptimizerView


def catch_up(view: OptimizerView, since: list[float]) -> None:
    """Do to every row's state what steps with a gradient of zero would have done.

    Args:
        view: of the optimizer.
        since: each group's value of the rule's lazy hyperparameter in the steps that were missed.

    Raises:
        RuntimeError: state does not fit its parameter, or kernels do not run where it is.
    """
    rule, rows = view.rule, view.rule.row_wise
    assert rows is not None and rows.lazy is not None
    planned: dict[torch.device, list[PlannedParam]] = defaultdict(list)
    for _, param, index, group, where, _ in view.named():
        state = view.state.get(param, {})
        if rows.state not in state:
            continue
        if reason := tensors_unsupported(param, param, row_wise=True):
            raise RuntimeError(f"sparse='lazy' cannot bring {where} up to date: {reason}")
        check_state_of(view, param, group, where, kernels=True)
        names, flags = rule.state_names(group), rule.active_flags(group) | {"CATCH_UP"}
        for name in misplaced(param, state, names):
            state[name] = laid_out_like(param, state[name])
        # The rule reads no gradient: the parameter takes its place.
        signature = GradSignature.of(param, param, row_wise=True)
        planned[param.device].append(
            PlannedParam(
                0, param, param, param, signature, (), index, flags, names, row_state=rows.state,
                where=where,
            )
        )  # fmt: skip
    before = [{**group, rows.lazy: v} for group, v in zip(view.groups, since, strict=False)]
    values = view.hyperparameters([*before, *view.groups[len(before) :]])
    for device, here in planned.items():
        RowWiseLaunchGroup(view, device, here, len(values)).catch_up(values)


def caught_up(view: OptimizerView, since: list[float]) -> defaultdict[Tensor, State]:
    """All state after `catch_up`, without the steps of rows, for a state dict."""
    catch_up(view, since)
    rows, states = view.rule.row_wise, defaultdict[Tensor, State](dict)
    assert rows is not None
    for param, values in view.state.items():
        states[param] = {name: value for name, value in values.items() if name != rows.state}
        if rows.state in values:
            states[param]["step"] = values["step"].to(step_dtype())
    return states
