"""Copies and state dicts under every configuration of torch's own database."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import as_saved, new_param, skip_without_late_state
from paired_optimizers import Pair
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch_optim_db import (
    INFOS,
    Config,
    LeastSquares,
    configs,
    every_config,
    every_optimizer,
    tensors_of,
)

from triton_optim.launch.variant import Variant


def _names(named: bool, params: list[Parameter]) -> list[Any]:
    return list(zip(("weight", "bias"), params, strict=True)) if named else params


@every_config
def test_copies_have_the_public_attributes(case: Config) -> None:
    problem = LeastSquares()
    optimizer = case.ours(problem.params)
    problem.train(optimizer)
    public, copied = (
        {name for name in vars(o) if not name.startswith("_")}
        for o in (optimizer, copy.deepcopy(optimizer))
    )
    assert copied == public


@every_config
def test_printed_as_torchs(case: Config) -> None:
    ours, theirs = (repr(make([new_param(1)], foreach=None)) for make in (case.ours, case.theirs))
    if case.optimizer == "RMSprop":
        ours = ours.replace("    fused: None\n", "")
    assert ours == theirs


def _saved_and_loaded(optimizer: Optimizer, **kwargs: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True, **kwargs)
    return loaded


@every_config
def test_saved_and_loaded_with_weights_only(case: Config) -> None:
    problem = LeastSquares()
    optimizer = case.ours(_names(True, problem.params))
    problem.train(optimizer)
    assert_same_bits(_saved_and_loaded(optimizer), optimizer.state_dict())


@every_config
def test_older_state_dict(case: Config, launches: list[Variant]) -> None:
    """Without the flags that came later, and with steps that are Python numbers."""
    newer = {flag for info in INFOS for flag in info.not_og_supported_flags}
    both = Pair(case)
    both.step(2)
    for optimizer in both.optimizers:
        older = copy.deepcopy(optimizer.state_dict())
        older["param_groups"] = [
            {k: v for k, v in group.items() if k not in newer} for group in older["param_groups"]
        ]
        for state in older["state"].values():
            state.update((k, v.item()) for k, v in state.items() if k == "step")
        optimizer.load_state_dict(older)
    as_saved(both.optimizers[1])
    both.step(2)
    assert len(launches) == 4


@pytest.mark.parametrize("named", [(False, True), (True, False)])
@every_config
def test_state_dict_is_deterministic(case: Config, named: tuple[bool, bool]) -> None:
    """Loaded in order, from or into one with names; a group that is repeated looks the same."""
    problems = LeastSquares(), LeastSquares()
    first, second = (
        case.ours(_names(*args)) for args in zip(named, (p.params for p in problems), strict=True)
    )
    problems[0].train(first, steps=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(*(problem.params for problem in problems), strict=True):
        q.data.copy_(p.data)
    for problem, optimizer in zip(problems, (first, second), strict=True):
        problem.train(optimizer, steps=1)
    assert second.param_groups[0].pop("param_names") == ["weight", "bias"]
    first.param_groups[0].pop("param_names", None)
    assert_same_bits(second.state_dict(), first.state_dict())
    second.param_groups.extend(second.param_groups)
    assert second.state_dict()["param_groups"][-1] == first.state_dict()["param_groups"][-1]


def _by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in the order of this optimizer's parameters, which have names."""
    (group,), (saved,) = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    places = dict(zip(saved["param_names"], saved["params"], strict=True))
    state = {
        new: state_dict["state"][places[name]]
        for new, name in zip(group["params"], group["param_names"], strict=True)
        if places.get(name) in state_dict["state"]
    }
    order = {key: group[key] for key in ("params", "param_names")}
    return {"state": state, "param_groups": [{**saved, **order}]}


@every_config
def test_loaded_by_name(case: Config) -> None:
    """In another order, and without a parameter, which starts afresh."""
    skip_without_late_state(case)
    source = Pair(case, lambda params: [("d", params[3]), ("c", params[2]), ("a", params[0])])
    source.step(2)
    target = Pair(case, lambda params: list(zip("abcd", params, strict=True)))
    for saved, optimizer in zip(source.optimizers, target.optimizers, strict=True):
        optimizer.register_load_state_dict_pre_hook(_by_name)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    as_saved(target.optimizers[1])
    target.step(2)


@every_optimizer
def test_freed_without_the_garbage_collector(case: Config) -> None:
    def train() -> weakref.ref[Optimizer]:
        problem = LeastSquares()
        optimizer = case.ours(problem.params)
        problem.train(optimizer, [ExponentialLR(optimizer, 0.9)])
        return weakref.ref(optimizer)

    gc.disable()
    try:
        assert train()() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [None, True])
@every_config
def test_a_checkpoint_crosses_devices(case: Config, fused: bool | None) -> None:
    """To the GPU and back; its tensors are on the CPU, and only `fused` moves the steps."""
    before = LeastSquares("cpu")
    optimizer = case.ours(before.params)
    before.train(optimizer)
    for device, flag in (("cuda", fused), ("cpu", None)):
        checkpoint = _saved_and_loaded(optimizer, map_location="cpu")
        checkpoint["param_groups"][0]["fused"] = flag
        kept = copy.deepcopy(checkpoint)
        after = LeastSquares(device)
        for p, q in zip(before.params, after.params, strict=True):
            q.data.copy_(p.data)
        moved = case.ours(after.params)
        moved.load_state_dict(checkpoint)
        assert_same_bits(checkpoint, kept)
        steps = tensors_of(moved).get("step", [])
        assert all(step.device.type == (device if flag else "cpu") for step in steps)
        for problem, stepped in ((before, optimizer), (after, moved)):
            problem.train(stepped)
        a, b = tensors_of(optimizer), tensors_of(moved)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, check_device=False)
        before, optimizer = after, moved


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [case for info in INFOS for case in configs(info, "cuda") if "capturable" in case.kwargs],
    ids=lambda case: case.name,
)
def test_capturable(case: Config, launches: list[Variant]) -> None:
    """Through the kernels, with steps counted on the GPU, as torch's."""
    pair = Pair(case)
    pair.step(3)
    assert len(launches) == 3
    ours, theirs = pair.optimizers
    for p, q in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert p["step"].is_cuda and q["step"].is_cuda
