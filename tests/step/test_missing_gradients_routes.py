"""Missing gradients beside clipping, a GradScaler, sparse gradients and the fallback to torch."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import DEVICE, Case, each, every_state, grad_of, new_param
from embedding_tables import SPARSE_CASES, Tables
from torch.nn import Parameter

import triton_optim
from triton_optim.step import plan


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


@each(SPARSE_CASES)
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
                grad = param.grad if sparse else grad_of(param).to_dense()
                param.grad = None if i == without else grad
            optimizer.step()
        torch.testing.assert_close(runs[0].params, runs[1].params, rtol=1e-12, atol=1e-12)
    assert not plans
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states)


def test_fallback_to_torch(plans: list[plan.Plan]) -> None:
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
