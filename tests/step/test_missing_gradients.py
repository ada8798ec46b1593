"""Gradients that are missing now and then: experts, layer drop, parameters frozen in turn."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, Case, every_state, interpreted, new_param
from paired_optimizers import SPECS, Pair
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

import triton_optim
from triton_optim.launch import backend
from triton_optim.launch.launcher import record_launches
from triton_optim.step import plan


def _subsets(n: int, steps: int) -> Iterator[tuple[int, ...]]:
    """Of n parameters, those without a gradient in a step: some, all, none."""
    chance = random.Random(0)
    for _ in range(steps):
        yield tuple(i for i in range(n) if chance.random() < 0.5)
    yield tuple(range(n))
    yield ()


@every_state
def test_steps_are_torchs(case: Case, plans: list[plan.Plan]) -> None:
    """And no plan is made anew once each parameter has had a gradient."""
    pair = Pair(case)
    pair.step(without=(1, 3))
    pair.step(without=(2,))
    pair.step()
    plans.clear()
    for without in _subsets(len(SPECS), 12):
        pair.step(without=without)
    assert not plans


@every_state
@pytest.mark.parametrize("first", [(), (0,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_state_is_made_with_the_first_gradient(case: Case, first: tuple[int, ...]) -> None:
    """As torch makes it: `pair` compares which parameters have state."""
    pair = Pair(case)
    for without in (first, first[:1], *_subsets(len(SPECS), 3)):
        pair.step(without=without)


def _frozen_in_turn(case: Case, make: str, plans: list[plan.Plan]) -> list[Parameter]:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(4, 3, dtype=torch.float64, device=DEVICE)) for _ in range(4)]
    optimizer = getattr(case, make)(params)
    for step in range(10):
        if step == 4:
            plans.clear()
        optimizer.zero_grad()
        for i, param in enumerate(params):
            param.requires_grad_(i != step % 4)
        sum((p * p).sum() for p in params if p.requires_grad).backward()  # type: ignore[union-attr]
        optimizer.step()
    return params


@every_state
def test_frozen_in_turn(case: Case, plans: list[plan.Plan]) -> None:
    ours = _frozen_in_turn(case, "ours", plans)
    assert not plans
    torch.testing.assert_close(ours, _frozen_in_turn(case, "theirs", plans), rtol=1e-12, atol=1e-12)


@every_state
def test_gradients_of_another_dtype_and_order(case: Case, plans: list[plan.Plan]) -> None:
    """What a missing one looked like is remembered: a kernel for it is there already."""
    params = [new_param(6, 11), new_param(70), new_param(5)]
    optimizer = case.ours(params)

    for without in (None, 0, 1, 2, None):
        memory = torch.randn(8, device=DEVICE)
        half = torch.randn(70, dtype=torch.bfloat16, device=DEVICE)
        for i, grad in enumerate((torch.randn(11, 6, device=DEVICE).t(), half, memory[1:6])):
            other = params[i].grad = torch.empty(params[i].shape, device=DEVICE)
            other.data = grad
            if i == without:
                params[i].grad = None
        if without == 0:
            plans.clear()
        optimizer.step()
    assert not plans


@every_state
def test_a_missing_one_is_left_alone(case: Case) -> None:
    """Bits, version counters, and an autograd graph through it."""
    params = [new_param(70), new_param(5)]
    optimizer = case.ours(params)
    optimizer.step()
    loss = (params[1] * params[1]).sum()
    state = optimizer.state.get(params[1], {})
    before = copy.deepcopy([params[1].detach(), dict(state)])
    versions = [t._version for t in (params[1], *state.values())]
    params[1].grad = None
    optimizer.step()
    assert_same_bits([params[1].detach(), dict(state)], before)
    assert [t._version for t in (params[1], *state.values())] == versions
    loss.backward()


@interpreted
@every_state
def test_no_byte_of_it_is_moved(case: Case) -> None:
    from lab.traffic import Traffic, watched

    moved = []
    for missing in (False, True):
        params = [new_param(1000), new_param(3000)]
        if not missing:
            del params[1]
        optimizer = case.ours(params)
        optimizer.step()
        params[-1].grad = None if missing else params[-1].grad
        traffic = Traffic()
        with watched(traffic.count):
            optimizer.step()
        moved.append((traffic.loaded, traffic.stored))
    (loaded, stored), (also_loaded, also_stored) = moved
    assert also_stored == stored
    n_programs = -(-3000 // 64)
    assert loaded < also_loaded <= loaded + 200 * n_programs + 100  # tables


@every_state
def test_nothing_is_compiled_or_bound_for_another_set(case: Case) -> None:
    params = [new_param(70), new_param(5), new_param(3)]
    optimizer = case.ours(params)
    optimizer.step()
    launches = []
    for without in (0, 1, 2):
        for i, param in enumerate(params):
            param.grad = None if i == without else torch.randn_like(param)
        with record_launches() as ran:
            optimizer.step()
        launches.append(ran)
    assert all(ran == launches[0] and len(ran) == 1 for ran in launches)


def test_host_work_is_that_of_a_steady_step() -> None:
    """No operation of torch's more than a few, however many gradients are missing."""
    n = 300
    params = [new_param(2) for _ in range(n)]
    optimizer = triton_optim.RMSprop(params)
    optimizer.step()
    grads = [param.grad for param in params]
    counts = []
    for missing in (0, n // 2):
        for i, param in enumerate(params):
            param.grad = grads[i] if i >= missing else None
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            optimizer.step()
        counts.append(sum(event.count for event in profiled.key_averages()))
    assert counts[1] <= counts[0] + 5
    assert backend.DEVICE_TYPE == DEVICE
