"""Gradients that are missing now and then: experts, layer drop, parameters frozen in turn."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE, Case, assert_same_bits, new_param
from embedding_tables import SPARSE_CASES, Tables
from paired_optimizers import SPECS, Pair, every_state
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

import triton_optim
from triton_optim.launch import backend
from triton_optim.launch.launcher import record_launches
from triton_optim.step import plan

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[plan.Plan]:
    """Every plan that is made."""
    made: list[plan.Plan] = []
    init = plan.Plan.__init__

    def recording(self: plan.Plan, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(plan.Plan, "__init__", recording)
    return made


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


@every_state
@pytest.mark.parametrize("skips", [False, True])
def test_max_grad_norm(case: Case, skips: bool, plans: list[plan.Plan]) -> None:
    """The norm is that of those which are there; a skipped step counts for none."""
    ours = [new_param(70, dtype=torch.float64), new_param(5, dtype=torch.float64)]
    theirs = copy.deepcopy(ours)
    optimizers = [case.ours(ours, max_grad_norm=0.5, skip_nonfinite=skips), case.theirs(theirs)]
    for without in (None, 0, None, 1):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if i == without else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].grad_norm, norm)
        assert_close = torch.testing.assert_close
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        if skips and without == 0:
            ours[1].grad = torch.full_like(ours[1], float("nan"))
            optimizers[0].step()
    ours_steps, steps = (
        [float(s["step"]) for s in optimizer.state.values() if "step" in s]
        for optimizer in optimizers
    )
    assert ours_steps == steps
    assert optimizers[0].skipped_steps == (1 if skips else None)


@pytest.mark.parametrize("fused", [None, True])
@every_state
def test_a_scaler(case: Case, fused: bool | None) -> None:
    ours, theirs = ([Parameter(torch.ones(3, device=DEVICE)) for _ in range(3)] for _ in range(2))
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=2) for _ in range(2)]
    optimizers = [case.ours(ours, fused=fused), case.theirs(theirs)]
    for step, factor in enumerate((1.0, float("inf"), 1.0, 1.0, 1.0)):
        for params, optimizer, scaler in zip((ours, theirs), optimizers, scalers, strict=True):
            optimizer.zero_grad()
            there = [p for i, p in enumerate(params) if i != step % 3]
            loss = torch.stack([(p * p).sum() for p in there]).sum()
            scaler.scale(factor * loss).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(ours, theirs)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states, check_device=False)


@pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.name)
def test_sparse_gradients(case: Case, plans: list[plan.Plan]) -> None:
    """Beside dense ones of the same optimizer."""
    runs = [Tables([(40, 4), (7, 4), (30, 3)]) for _ in range(2)]
    dense = [[new_param(5, dtype=torch.float64)] for _ in runs]
    dense[1][0].data.copy_(dense[0][0])
    optimizers = [
        case.ours([*runs[0].params, *dense[0]]),
        case.theirs([*runs[1].params, *dense[1]]),
    ]
    for k, without in enumerate(((), (0,), (3,), (0, 1, 2), (1, 3), (2,), (0, 1, 2, 3))):
        if k == 1:
            plans.clear()
        for run, (param,), optimizer in zip(runs, dense, optimizers, strict=True):
            run.new_gradients([9, 5, 3])
            param.grad = torch.full_like(param, k)
            for i in without:
                [*run.params, param][i].grad = None
            optimizer.step()
        ours, theirs = ([*run.params, *ps] for run, ps in zip(runs, dense, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not plans
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("sparse", [False, True])
def test_row_wise(sparse: bool, plans: list[plan.Plan]) -> None:
    runs = [Tables([(40, 4), (7, 4)]) for _ in range(2)]
    optimizers = [
        triton_optim.RowwiseAdagrad(run.params, lr=0.1, fused=fused)
        for run, fused in zip(runs, (None, False), strict=True)
    ]
    for k, without in enumerate((None, 0, 1, None, 0)):
        if k == 1:
            plans.clear()
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([9, 5])
            for i, param in enumerate(run.params):
                assert param.grad is not None
                grad = param.grad if sparse else param.grad.to_dense()
                param.grad = None if i == without else grad
            optimizer.step()
        torch.testing.assert_close(runs[0].params, runs[1].params, rtol=1e-12, atol=1e-12)
    assert not plans
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states)


def test_on_torchs_own_way(plans: list[plan.Plan]) -> None:
    params = [new_param(5), new_param(3)]
    optimizer = triton_optim.RMSprop(params, fused=False)
    optimizer.step()
    plans.clear()
    before = params[0].detach().clone()
    for _ in range(2):
        params[0].grad = None
        optimizer.step()
    assert torch.equal(params[0], before)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before)
    assert not plans


def test_an_empty_parameter_counts_as_the_others() -> None:
    """Its gradient has no address, and is there all the same."""
    params = [new_param(0), new_param(3), new_param(0)]
    for scaled in (False, True):
        optimizer = triton_optim.RMSprop(params, fused=scaled or None)
        for found_inf in (0.0, 0.0, 1.0):
            if scaled:
                vars(optimizer)["found_inf"] = torch.tensor(found_inf, device=DEVICE)
            params[2].grad = None if found_inf == 0 and optimizer.state else params[0].grad
            optimizer.step()
            params[2].grad = params[0].grad
        assert [float(s["step"]) for s in optimizer.state.values()] == (
            [2.0, 2.0, 1.0] if scaled else [3.0, 3.0, 2.0]
        )


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
