"""The class around the step: constructor, state dicts, copies, hooks, scaler."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import CASES, DEVICE, Case, every_state
from paired_optimizers import Pair, two_groups
from torch.nn import Parameter

import triton_optim


@every_state
def test_state_dict_to_torch_and_back(case: Case) -> None:
    pair = Pair(case, two_groups)
    pair.step(3)
    file = io.BytesIO()
    torch.save([optimizer.state_dict() for optimizer in pair.optimizers], file)
    file.seek(0)
    ours, theirs = torch.load(file, weights_only=True)
    assert ours["state"].keys() == theirs["state"].keys()
    # Crossed: ours takes torch's checkpoint and torch's takes ours.
    pair.optimizers[0].load_state_dict(theirs)
    pair.optimizers[0].param_groups[0]["foreach"] = None
    pair.optimizers[0].param_groups[1]["foreach"] = None
    pair.optimizers[1].load_state_dict(ours)
    pair.step(3)


@every_state
def test_load_state_dict_in_mid_run(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    pair.step(2)
    for optimizer, state_dict in zip(pair.optimizers, saved, strict=True):
        optimizer.load_state_dict(state_dict)
    pair.step(2)


def test_state_dict_of_sgd_from_before_the_first_momentum() -> None:
    pair = Pair(next(case for case in CASES if case.name == "sgd-dampening"))
    pair.each(lambda o, params: o.state[params[0]].update(momentum_buffer=None))
    pair.step(3)


@every_state
def test_deepcopy_and_pickle(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    duplicates: list[Any] = [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
    for duplicate in duplicates:
        for i, tensors in enumerate(pair.tensors):
            optimizer = duplicate(pair.optimizers[i])
            pair.optimizers[i] = optimizer
            tensors.params = [p for group in optimizer.param_groups for p in group["params"]]
        pair.step(2)


def test_closure_hooks_and_order() -> None:
    calls: list[str] = []
    param = Parameter(torch.ones(3, device="cpu"))
    optimizer = triton_optim.SGD([param], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) == 3.0
    assert calls == ["pre", "closure", "post"]
    assert torch.equal(param, torch.zeros(3))


class _Overriding(triton_optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Wrapping(triton_optim.SGD):
    pass


def _wrapped(step: Any) -> Any:
    return functools.wraps(step)(lambda *args: step(*args))


_Wrapping.step = _wrapped(triton_optim.SGD.step)  # type: ignore[method-assign]


class _Patched(triton_optim.SGD):
    pass


@pytest.mark.parametrize("make", [triton_optim.SGD, _Overriding, _Wrapping, _Patched])
def test_hooks_run_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also around a step that overrides ours, which torch wraps or not, or one patched in later."""
    calls: list[str] = []
    param = Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = make([param], lr=0.25)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    if make is _Patched:
        monkeypatch.setattr(make, "step", _wrapped(make.step))
    for _ in range(2):
        optimizer.step()
        assert calls == ["pre", "post"]
        calls.clear()
    assert torch.equal(param, torch.full_like(param, 0.5))


def test_a_profiler_sees_the_step() -> None:
    param = Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = triton_optim.SGD([param])
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profiler.key_averages()}
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]


@every_state
def test_an_exception_in_the_closure_leaves_everything(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    before = copy.deepcopy(pair.optimizers[0].state_dict())

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.optimizers[0].step(closure)
    assert_same_bits(pair.optimizers[0].state_dict(), before)
    pair.step(2)


@every_state
def test_named_parameters(case: Case) -> None:
    names = "abcd"
    pair = Pair(case, lambda params: list(zip(names, params, strict=True)))
    pair.step(2)
    assert pair.optimizers[0].state_dict()["param_groups"][0]["param_names"] == list(names)


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_constructor_is_torchs(name: str) -> None:
    ours, theirs = getattr(triton_optim, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    signature, expected = inspect.signature(ours), inspect.signature(theirs)
    found = [(p.name, p.kind, p.default) for p in signature.parameters.values()]
    torchs = [(p.name, p.kind, p.default) for p in expected.parameters.values()]
    own: dict[str, object] = {
        "max_grad_norm": None,
        "error_if_nonfinite": False,
        "skip_nonfinite": False,
    }
    own |= {"master_weight_bits": None, "stochastic_rounding": None, "state_dtype": None}
    own |= {"rounding_seed": 0}
    own |= {
        k: v for k, v in (("fused", None), ("capturable", False)) if k not in expected.parameters
    }
    if name in ("SGD", "Adagrad", "RMSprop"):
        own["decoupled_weight_decay"] = False
    if name == "RMSprop":
        own["sparse"] = None
    assert found[: len(torchs)] == torchs
    assert {n: default for n, _, default in found[len(torchs) :]} == own
    assert {kind for _, kind, _ in found[len(torchs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SGD", {"lr": -1.0}),
        ("SGD", {"weight_decay": -1.0}),
        ("SGD", {"nesterov": True}),
        ("Adagrad", {"initial_accumulator_value": -1.0}),
        ("Adagrad", {"eps": -1.0}),
        ("RMSprop", {"alpha": -1.0}),
        ("RMSprop", {"unknown": 1}),
    ],
)
def test_constructor_refuses_what_torchs_database_lacks(name: str, kwargs: dict[str, Any]) -> None:
    errors = []
    for module in (triton_optim, torch.optim):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
            getattr(module, name)([Parameter(torch.ones(1))], **kwargs)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
