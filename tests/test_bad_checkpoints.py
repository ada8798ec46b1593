"""Checkpoints that do not fit: refused when loaded, and the optimizer goes on as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import STATEFUL_CASES, Case, main_state, new_param, refused, twins_of

with_state = pytest.mark.parametrize("case", STATEFUL_CASES[1:], ids=lambda case: case.name)

# What becomes of parameter 1 in a checkpoint, whose main state is {}, and the error.
CHECKPOINT_DAMAGES: dict[str, tuple[Callable[[dict[str, Any], str], object], str]] = {
    "short": (lambda e, n: e.update({n: e[n][:-1]}), "'{}' of parameter 1 .* has shape"),
    "two-dim": (lambda e, n: e.update({n: e[n].view(1, -1)}), "'{}' of parameter 1 .* has shape"),
    "missing": (lambda e, n: e.pop(n), "'{}' of parameter 1 .* is None"),
    "number": (lambda e, n: e.update({n: 1.5}), "'{}' of parameter 1 .* is 1.5"),
    "sparse": (lambda e, n: e.update({n: e[n].to_sparse()}), "'{}' of parameter 1 .*sparse_coo"),
    "meta": (lambda e, n: e.update({n: e[n].to("meta")}), "'{}' of parameter 1 is on meta"),
    "extra": (lambda e, n: e.update(exp_avg=e[n].clone()), "'exp_avg' of parameter 1 .* is none"),
}
STEP_DAMAGES: dict[str, tuple[Callable[[dict[str, Any], str], object], str]] = {
    "no-step": (lambda e, _: e.pop("step"), "'step' of parameter 1 .* is None"),
    "list-step": (lambda e, _: e.update(step=[1.5]), r"'step' of parameter 1 .* is \[1.5\]"),
    "two-steps": (lambda e, _: e.update(step=torch.ones(2)), "'step' of parameter 1 "),
    "complex-step": (lambda e, _: e.update(step=torch.ones((), dtype=torch.cfloat)), "'step' of p"),
}
ALL_DAMAGES = {**CHECKPOINT_DAMAGES, **STEP_DAMAGES}


def _applies(case: Case, damage: str) -> bool:
    """SGD takes a missing momentum for a parameter that has not been updated yet, as torch does."""
    return case.optimizer != "SGD" or damage not in (*STEP_DAMAGES, "missing")


@pytest.mark.parametrize(
    ("case", "damage"),
    [(c, damage) for c in STATEFUL_CASES[1:] for damage in ALL_DAMAGES if _applies(c, damage)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_damaged_checkpoint_is_not_loaded(case: Case, damage: str) -> None:
    inflict, message = ALL_DAMAGES[damage]
    params = [new_param(3), new_param(100)]
    optimizer, twin = case.ours(params), case.theirs([p for q in params for p in twins_of(q)[:1]])
    optimizer.step()
    twin.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    inflict(checkpoint["state"][1], main_state(case))
    with refused(message.format(main_state(case)), optimizer, params):
        optimizer.load_state_dict(checkpoint)
    optimizer.step()
    twin.step()
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)


@with_state
def test_a_checkpoint_of_more_parameters(case: Case) -> None:
    param = new_param(3)
    optimizer = case.ours([param])
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][7] = checkpoint["state"][0]
    with refused("state for parameter 7, but the optimizer has 1", optimizer, [param]):
        optimizer.load_state_dict(checkpoint)
