"""State that does not fit raises, when loaded or at the step; the optimizer goes on as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same_bits, raises
from cases import (
    BLOCK,
    DEVICE,
    STATEFUL_CASES,
    Case,
    every_state,
    main_state,
    new_param,
    two_copies,
    with_state,
    with_step,
)
from torch import Tensor

# What becomes of parameter 1 in a checkpoint, whose main state is {}, and the error.
CHECKPOINT_DAMAGES: dict[str, tuple[Callable[[dict[str, Any], str], object], str]] = {
    "short": (lambda e, n: e.update({n: e[n][:-1]}), "'{}' of parameter 1 .* has shape"),
    "two-dim": (lambda e, n: e.update({n: e[n].view(1, -1)}), "'{}' of parameter 1 .* has shape"),
    "missing": (lambda e, n: e.pop(n), "'{}' of parameter 1 .* is None"),
    "number": (lambda e, n: e.update({n: 1.5}), "'{}' of parameter 1 .* is 1.5"),
    "sparse": (lambda e, n: e.update({n: e[n].to_sparse()}), "'{}' of parameter 1 .*sparse_coo"),
    "meta": (lambda e, n: e.update({n: e[n].to("meta")}), "'{}' of parameter 1 is on meta"),
    "foreign": (lambda e, n: e.update(foreign=e.pop(n)), "'{}' of parameter 1 .* is None"),
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
    optimizer, twin = case.ours(params), case.theirs([p for q in params for p in two_copies(q)[:1]])
    optimizer.step()
    twin.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    inflict(checkpoint["state"][1], main_state(case))
    with raises(message.format(main_state(case)), optimizer, params):
        optimizer.load_state_dict(checkpoint)
    optimizer.step()
    twin.step()
    torch.testing.assert_close(params, twin.param_groups[0]["params"])


@with_state
def test_a_checkpoint_of_more_parameters(case: Case) -> None:
    param = new_param(3)
    optimizer = case.ours([param])
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][7] = checkpoint["state"][0]
    with raises("state for parameter 7, but the optimizer has 1", optimizer, [param]):
        optimizer.load_state_dict(checkpoint)


@every_state
def test_a_checkpoint_of_another_optimizer(case: Case) -> None:
    """Its groups have other hyperparameters, whether or not it holds state."""
    param, other = new_param(3), new_param(3)
    optimizer = case.ours([param])
    optimizer.step()
    adafactor = torch.optim.Adafactor([other])
    for _ in range(2):
        checkpoint = copy.deepcopy(adafactor.state_dict())
        with raises("group 0 of the state dict has no|of parameter 0", optimizer, [param]):
            optimizer.load_state_dict(checkpoint)
        adafactor.step()


@with_state
def test_a_checkpoint_whose_entry_is_no_dict(case: Case) -> None:
    param = new_param(3)
    optimizer = case.ours([param])
    optimizer.step()
    checkpoint = {**optimizer.state_dict(), "state": {0: None}}
    with raises("state of parameter 0 of group 0 is None", optimizer, [param]):
        optimizer.load_state_dict(checkpoint)


@with_state
def test_a_checkpoint_whose_tensors_are_one(case: Case) -> None:
    params = [new_param(3), new_param(3)]
    optimizer = case.ours(params)
    optimizer.step()
    checkpoint, name = copy.deepcopy(optimizer.state_dict()), main_state(case)
    checkpoint["state"][1][name] = checkpoint["state"][0][name]
    with raises(f"'{name}' of parameter 0 .* share memory", optimizer, params):
        optimizer.load_state_dict(checkpoint)


@with_state
def test_a_short_checkpoint_for_the_fallback(case: Case) -> None:
    """Refused too; and at the step, if it came into the optimizer in another way."""
    params = [new_param(3), new_param(5)]
    optimizer = case.ours(params, fused=False)
    optimizer.step()
    name = main_state(case)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][1][name] = checkpoint["state"][1][name][:1]
    with raises(f"'{name}' of parameter 1 of group 0 has shape", optimizer, params):
        optimizer.load_state_dict(checkpoint)
    optimizer.state[params[1]] = {**optimizer.state[params[1]], name: torch.ones(1, device=DEVICE)}
    with raises(f"'{name}' of parameter 1 of group 0 has shape", optimizer, params):
        optimizer.step()


@every_state
def test_what_torch_loads_is_loaded(case: Case) -> None:
    """A wrapper's tensor beside ours, what a hook unwraps, names for some, steps from numpy."""
    p, q = two_copies(new_param(3))
    ours, theirs = case.ours([("p", p)]), case.theirs([("q", q)])
    for optimizer, param in ((ours, p), (theirs, q)):
        optimizer.step()
        optimizer.state[param]["slow"] = param.detach().clone()
        optimizer.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["optimizer"])
        checkpoint = copy.deepcopy(optimizer.state_dict())
        checkpoint["param_groups"][0]["param_names"] = []
        for state in checkpoint["state"].values():
            state.update((k, np.int64(v)) for k, v in state.items() if k == "step")
        optimizer.load_state_dict({"optimizer": checkpoint})
        optimizer.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(ours.state[p]["slow"], theirs.state[q]["slow"])


STATE_DAMAGES: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "short": (lambda t: t.flatten()[:-1].clone(), r"has shape \(11,\)"),
    "integer": (lambda t: t.int(), "is torch.int32"),
    "sparse": (lambda t: t.to_sparse(), "is torch.sparse_coo"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64"),
    "missing": (lambda t: None, "is None"),
    "device": (lambda t: t.to("meta"), "is on meta"),
}


@with_step
@pytest.mark.parametrize("damage", STATE_DAMAGES)
def test_state_damaged_between_steps(case: Case, damage: str) -> None:
    name = main_state(case)
    inflict, message = STATE_DAMAGES[damage]
    params = [new_param(5), new_param(3, 4), new_param(BLOCK + 1)]
    optimizer = case.ours([("a", params[0]), ("b", params[1]), ("c", params[2])])
    optimizer.step()
    entry = optimizer.state[params[1]]
    entry[name], kept = inflict(entry[name]), entry[name]
    steps = [float(optimizer.state[p]["step"]) for p in params]
    others = copy.deepcopy([optimizer.state[p] for p in (params[0], params[2])])
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError, match=rf"'{name}' of parameter 1 \('b'\) of group 0 {message}"
    ):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)
    assert [float(optimizer.state[p]["step"]) for p in params] == steps
    assert_same_bits([optimizer.state[p] for p in (params[0], params[2])], others)
    entry[name] = kept
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [s + 1 for s in steps]
