"""Checkpoints of torch's fused and capturable steps, into ours and from ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES, DEVICE, SCALARS, TORCH, Case, as_saved, each
from paired_optimizers import Pair

FUSED = [
    c for c in CASES if c.name in ("sgd-momentum", "adagrad-lr_decay", "adam-amsgrad", "adamw-all")
]
NAMES = ("RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adadelta", "Rprop", "ASGD")
CAPTURABLE = [case for case in CASES if case.optimizer in NAMES and case.name.endswith("-all")]
CAPTURABLE += [case for case in CASES if case.name == "adam-amsgrad"]


def _saved(pair: Pair, **flags: Any) -> list[dict[str, Any]]:
    """Ours and torch's, with these flags in the groups."""
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    for state_dict in saved:
        for group in state_dict["param_groups"]:
            group.update(flags)
    return saved


@each(FUSED)
@pytest.mark.parametrize("ours_is_fused", [False, True])
def test_fused(case: Case, ours_is_fused: bool) -> None:
    """torch's fused class on the device at hand: its dict in ours, and ours in that class."""
    if case.optimizer == "Adagrad" and DEVICE == "cuda" and TORCH < (2, 12):
        pytest.skip("torch has a fused Adagrad on GPUs since 2.12")
    pair = Pair(case)
    pair.optimizers[1] = case.theirs(pair.tensors[1].params, foreach=None, fused=True)
    pair.step(2)
    ours, theirs = _saved(pair, foreach=None, fused=True)
    theirs["param_groups"][0]["fused"] = ours_is_fused or None
    pair.optimizers[0].load_state_dict(theirs)
    pair.optimizers[1].load_state_dict(ours)
    assert pair.optimizers[1].param_groups[0]["fused"] is True
    pair.step(2)


@pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")
@pytest.mark.usefixtures("cuda")
@each(CAPTURABLE)
def test_capturable(case: Case) -> None:
    """Steps and other scalars are float32 tensors where the parameters are."""
    pair = Pair(case)
    pair.step(2)
    ours, theirs = _saved(pair, foreach=None, capturable=True)
    for state in theirs["state"].values():
        assert all(state[name].dtype == torch.float32 for name in SCALARS & state.keys())
    pair.optimizers[0].load_state_dict(theirs)
    pair.optimizers[1].load_state_dict(ours)
    assert pair.optimizers[0].param_groups[0]["capturable"] is True
    # which torch takes on a GPU alone
    pair.optimizers[1].param_groups[0].update(capturable=False, foreach=False)
    as_saved(pair.optimizers[1])
    pair.step(2)
