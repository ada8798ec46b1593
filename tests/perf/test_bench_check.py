"""The check of a step before any time: what is right passes it, and what is wrong does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE
from lab import reference, workload
from lab.implementations import IMPLEMENTATIONS, Implementation
from lab.rows import OURS
from lab.rules import FORMATS, RULES, STORAGES, Rule, Storage
from lab.suites import Layout
from torch.nn import Parameter
from torch.optim import Optimizer

FLOAT32, BFLOAT16, MIXED = STORAGES

SGD, MOMENTUM, ADAGRAD, RMSPROP, RMSPROP_CM, ADAMW = RULES
TINY = Layout("tiny", [("weight", (12, 15)), ("bias", (7,)), ("scale", (1,))])


@pytest.mark.parametrize("numel", [1, 2, 1000, 1024, 1025, 10_000_000_000])
def test_checked_elements_are_spread_over_a_tensor(numel: int) -> None:
    places = workload._places(numel, "cpu").tolist()
    assert (places[0], places[-1]) == (0, numel - 1)
    assert len(set(places)) == len(places) == min(numel, 1024)


def _error(
    build: Callable[[Rule, list[Parameter]], Optimizer], rule: Rule, storage: Storage
) -> float:
    tensors = workload.Workload(TINY, rule, storage, DEVICE)
    step = tensors.build(Implementation("", "torch", build, lambda *_: None))
    return tensors.check(step, lambda: None)[0]


def _for_loop(rule: Rule, params: list[Parameter], **changes: Any) -> Optimizer:
    changed = rule._replace(kwargs={**rule.kwargs, **changes})
    optimizer: Optimizer = IMPLEMENTATIONS[1].build(changed, params)
    return optimizer


@pytest.mark.parametrize("storage", [*STORAGES, *FORMATS], ids=lambda storage: storage.name)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_check_passes_what_is_right(rule: Rule, storage: Storage) -> None:
    builds = [item.build for item in IMPLEMENTATIONS if item.name == OURS]
    if storage.param == storage.state and not storage.options:
        builds.append(_for_loop)
    if IMPLEMENTATIONS[0].refusal(rule, storage):
        pytest.skip("rule and storage do not go together")
    for build in builds:
        assert _error(build, rule, storage) <= workload.tolerance(storage)


def _too_fast(rule: Rule, params: list[Parameter]) -> Optimizer:
    return _for_loop(rule, params, lr=1.0001 * rule.kwargs["lr"])


def _forgets_the_last_tensor(rule: Rule, params: list[Parameter]) -> Optimizer:
    return _for_loop(rule, params[:-1])


def _forgets_the_last_element(rule: Rule, params: list[Parameter]) -> Optimizer:
    optimizer = _for_loop(rule, params)

    def put_back(*_: object) -> None:
        with torch.no_grad():
            params[0].view(-1)[-1] = kept[0]

    kept = [float(params[0].detach().view(-1)[-1])]
    optimizer.register_step_post_hook(put_back)
    return optimizer


def _makes_nan(rule: Rule, params: list[Parameter]) -> Optimizer:
    return _for_loop(rule, params, lr=math.nan if rule.optimizer == "SGD" else math.inf)


@pytest.mark.parametrize(
    ("build", "storages"),
    [
        (_too_fast, (FLOAT32,)),
        (_forgets_the_last_tensor, (FLOAT32, BFLOAT16)),
        (_forgets_the_last_element, (FLOAT32,)),
        (_makes_nan, (FLOAT32, BFLOAT16)),
    ],
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_check_fails_what_is_wrong(
    build: Callable[..., Optimizer], storages: tuple[Storage, ...], rule: Rule
) -> None:
    for storage in storages:
        assert not _error(build, rule, storage) <= workload.tolerance(storage)


def test_the_check_gives_every_step_new_gradients() -> None:
    tensors = workload.Workload(TINY, SGD, FLOAT32, DEVICE)
    grads = [param.grad for param in tensors.params if param.grad is not None]
    seen: list[tuple[float, ...]] = []

    def step() -> None:
        seen.append(tuple(float(grad.abs().sum()) for grad in grads))

    tensors.check(step, lambda: None)
    assert len(set(seen)) == len(seen) == reference.CHECKED_STEPS
    assert all(all(sums) for sums in seen)
    assert all(param.grad is grad for param, grad in zip(tensors.params, grads, strict=True))


def test_renewed_tensors_stay_where_they_are() -> None:
    tensors = workload.Workload(TINY, RMSPROP_CM, FLOAT32, DEVICE)
    optimizers: list[Optimizer] = []

    def build(rule: Rule, params: list[Parameter]) -> Optimizer:
        optimizers.append(_for_loop(rule, params))
        return optimizers[0]

    step = tensors.build(Implementation("", "torch", build, lambda *_: None))
    step()

    def found() -> list[torch.Tensor]:
        states = [v for s in optimizers[0].state.values() for k, v in s.items() if k != "step"]
        grads = [param.grad for param in tensors.params if param.grad is not None]
        return [*tensors.params, *grads, *states]

    before = [(tensor.data_ptr(), tensor.detach().clone()) for tensor in found()]
    tensors.renew()
    for (address, old), tensor in zip(before, found(), strict=True):
        assert tensor.data_ptr() == address
        assert not torch.equal(tensor, old)
    assert not any(tensor.any() for tensor in found()[2 * len(TINY.tensors) :])
