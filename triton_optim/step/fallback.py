"""What steps parameters that no kernel takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from ..options import Group
from ..rule import State
from .state import new_state
from .view import OptimizerView


def for_torch(group: Group, ids: Collection[int]) -> Group:
    """A group with those of its parameters that have these ids, as torch's class steps them right.

    Its fused CPU kernels skip and garble elements. Its foreach step, the default on a GPU, updates
    a parameter that is listed twice once, and SGD's fails with `differentiable` and a tensor lr.
    """
    params = [param for param in group["params"] if id(param) in ids]
    torchs = {**group, "params": params, "fused": None if group.get("fused") is None else False}
    if group.get("differentiable") or len(params) > len({*map(id, params)}):
        torchs["foreach"] = False
    return torchs


def make_missing_state(view: OptimizerView, groups: Iterable[Group]) -> None:
    """Make state of late groups, which torch before 2.12 makes in its constructor only."""
    for _ in _with_state(view, groups):
        pass


def reference_step(view: OptimizerView, groups: Iterable[Group]) -> None:
    """Step these groups' parameters with the rule's reference."""
    reference = view.rule.reference
    assert reference is not None
    counts_step = view.rule.counts_step
    for param, grad, state, group in _with_state(view, groups):
        if counts_step:
            state["step"] += 1  # which the reference may read
        try:
            reference(param, grad, state, group)
        except BaseException:
            if counts_step:
                state["step"] -= 1
            raise
        if state:
            view.state[param] = state


def decays(view: OptimizerView, groups: Iterable[Group]) -> list[tuple[Tensor, Tensor]]:
    """What decoupled weight decay takes from each parameter; torch's step of these groups does not.

    To be subtracted after that step: if it raises, nothing has decayed.
    """
    taken = []
    for group in groups:
        weight_decay, group["weight_decay"] = group["weight_decay"], 0
        decays = isinstance(weight_decay, Tensor) or weight_decay != 0
        for param in group["params"]:
            if decays and param.grad is not None:
                rate = group["lr"] * weight_decay
                if group.get("lr_decay"):  # Adagrad's
                    rate = rate / (1 + float(view.state[param]["step"]) * group["lr_decay"])
                if isinstance(rate, Tensor):
                    rate = rate.squeeze()
                taken.append((param, param * rate))
    return taken


def _with_state(
    view: OptimizerView, groups: Iterable[Group]
) -> Iterator[tuple[Tensor, Tensor, State, Group]]:
    """Every parameter that has a gradient, which is the next, its state and its group."""
    rule = view.rule
    for group in groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            state = view.state.get(param, {})
            if not rule.has_state(state) and (rule.counts_step or rule.state_names(group)):
                view.state[param] = state = new_state(view, param, group)
            yield param, param.grad, state, group
