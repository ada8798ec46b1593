"""RMSprop on sparse gradients: equal to dense RMSprop at the cost of the rows that are touched."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, scaled_step
from embedding_tables import Tables, check_both, lazy_and_dense, sparse, step_both, worst

import triton_optim
from triton_optim.launch.launcher import record_launches

centered_or_not = pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])


@centered_or_not
def test_many_steps_equal_dense_ones(centered: bool) -> None:
    """Of 200 rows, three a step, some left out for hundreds of steps, one for all of them."""
    steps = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 300
    runs, optimizers = lazy_and_dense(centered, ((200, 4),), alpha=0.999)
    for step in range(steps):
        for run, optimizer in zip(runs, optimizers, strict=True):
            (param,) = run.params
            ids = [step % 7, 7 + (step * step) % 192, 7]
            grad = sparse(ids, run.draw(3, 4), param)
            param.grad = grad if run is runs[0] else grad.to_dense()
            optimizer.step()
        if step % 100 == 99:
            assert worst(runs[0].params, runs[1].params) < 1e-12
    gaps = steps - optimizers[0].state[runs[0].params[0]]["last_step"]
    assert gaps.min() == 0
    assert gaps.max() == steps
    check_both(runs, optimizers)


@centered_or_not
def test_errors_in_float32_are_of_its_rounding(centered: bool) -> None:
    runs = [Tables([(30, 4)], torch.float32), Tables([(30, 4)], torch.float32, torch.float64)]
    kwargs: dict[str, Any] = {"lr": 0.01, "centered": centered, "alpha": 0.9}
    optimizers = [
        triton_optim.RMSprop(runs[0].params, sparse="lazy", **kwargs),
        torch.optim.RMSprop(runs[1].params, foreach=False, **kwargs),
    ]
    for _ in range(30):
        step_both(runs, optimizers)
    assert worst(runs[0].params, runs[1].params) < 1e-5
    for name in ("square_avg", *(["grad_avg"] if centered else [])):
        ours, exact = (o.state_dict()["state"][0][name] for o in optimizers)
        assert worst([ours], [exact]) < 1e-6


def test_only_touched_rows_are_written_in_one_launch() -> None:
    """The sanitizer sees every other store."""
    runs, optimizers = lazy_and_dense(shapes=((30, 4), (10, 4)))
    for _ in range(3):
        with record_launches() as launches:
            step_both(runs, optimizers)
        assert [launch.name for launch in launches] == ["keys_kernel", "rows_kernel"]
    state = optimizers[0].state[runs[0].params[0]]
    assert list(state) == ["step", "square_avg", "last_step"]
    assert (state["last_step"].dtype, state["last_step"].shape) == (torch.int32, (30,))


@centered_or_not
def test_torch_goes_on_from_our_state_dict_and_we_from_its(centered: bool) -> None:
    runs, optimizers = lazy_and_dense(centered, steps=10)
    saved = optimizers[0].state_dict()
    expected = ["step", "square_avg", *(["grad_avg"] if centered else [])]
    assert list(saved["state"][0]) == expected
    fresh = torch.optim.RMSprop(runs[0].params, foreach=False)
    fresh.load_state_dict(copy.deepcopy(saved))
    for _ in range(3):  # ours with torch's class now, and dense gradients
        for run, optimizer in zip(runs, (fresh, optimizers[1]), strict=True):
            run.new_gradients([5])
            run.params[0].grad = run.params[0].grad.to_dense()  # type: ignore[union-attr]
            optimizer.step()
    ours = triton_optim.RMSprop(runs[0].params, sparse="lazy")
    ours.load_state_dict(copy.deepcopy(fresh.state_dict()))
    for _ in range(10):
        step_both(runs, [ours, optimizers[1]])
    check_both(runs, [ours, optimizers[1]])


@centered_or_not
def test_dense_gradients_in_between(centered: bool) -> None:
    runs, optimizers = lazy_and_dense(centered)
    for step in range(12):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([5])
            (param,) = run.params
            assert param.grad is not None
            if run is runs[1] or step % 4 == 2:
                param.grad = param.grad.to_dense()
            if step == 5:
                param.grad = None
            optimizer.step()
    check_both(runs, optimizers)


def test_a_changed_alpha_holds_from_then_on() -> None:
    runs, optimizers = lazy_and_dense(alpha=0.9)
    for step in range(9):
        if step in (3, 6):
            for optimizer in optimizers:
                optimizer.param_groups[0]["alpha"] = 0.5 + 0.05 * step
        step_both(runs, optimizers, count=2)
    for optimizer in optimizers:
        optimizer.param_groups[0]["alpha"] = 0.1  # and is not that of the steps before
    check_both(runs, optimizers)
    step_both(runs, optimizers)
    check_both(runs, optimizers)


def test_copies_go_on_alike() -> None:
    runs, optimizers = lazy_and_dense(steps=4)
    optimizers[0].param_groups[0]["alpha"] = 0.5
    clone = copy.deepcopy(optimizers[0])
    (twin,) = clone.param_groups[0]["params"]
    (param,) = runs[0].params
    for p, optimizer in ((param, optimizers[0]), (twin, clone)):
        p.grad = sparse([3, 3, 9], torch.ones(3, 4, dtype=torch.float64, device=DEVICE), p)
        optimizer.step()
    assert_same_bits(twin.detach(), param.detach())
    assert_same_bits(clone.state_dict(), optimizers[0].state_dict())


def test_a_skipped_step_counts_for_no_row() -> None:
    runs, optimizers = lazy_and_dense(steps=1)
    (param,) = runs[0].params
    before = copy.deepcopy([param.detach(), dict(optimizers[0].state[param])])
    runs[0].new_gradients([5])
    scaled_step(optimizers[0], found_inf=1.0)
    assert_same_bits([param.detach(), dict(optimizers[0].state[param])], before)
    runs[1].new_gradients([5])  # as many numbers drawn
    for _ in range(3):
        step_both(runs, optimizers)
    check_both(runs, optimizers)


def test_steps_beyond_what_float32_counts() -> None:
    runs, optimizers = lazy_and_dense(alpha=0.9, steps=1)
    (param,) = runs[0].params
    state = optimizers[0].state[param]
    state["step"].fill_(2**24)
    state["last_step"].fill_(2**24)
    for _ in range(6):
        step_both(runs, optimizers, count=2)
    assert state["step"] == 2**24 + 6
    saved = optimizers[0].state_dict()["state"][0]
    exact = optimizers[1].state[runs[1].params[0]]
    torch.testing.assert_close(saved["square_avg"], exact["square_avg"], rtol=1e-12, atol=1e-12)
    assert saved["step"].dtype == torch.float32
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    assert optimizers[0].state[param]["step"].dtype == torch.float64


def test_a_state_dict_writes_no_parameter() -> None:
    """A backward pass may follow."""
    runs, optimizers = lazy_and_dense(steps=3)
    (param,) = runs[0].params
    loss, before = param.square().sum(), param.detach().clone()
    optimizers[0].state_dict()
    loss.backward()
    assert_same_bits(param.detach(), before)


def test_an_infinite_average_stays_one() -> None:
    tables = Tables([(4, 2)], torch.float32)
    (param,) = tables.params
    optimizer = triton_optim.RMSprop([param], sparse="lazy", alpha=0.5)
    tables.new_gradients([3])
    optimizer.step()
    state = optimizer.state[param]
    state["square_avg"].fill_(float("inf"))
    state["step"].fill_(2000)
    before = param.detach().clone()
    param.grad = sparse([0, 1], tables.draw(2, 2), param)
    optimizer.step()
    assert_same_bits(param.detach(), before)
    assert optimizer.state_dict()["state"][0]["square_avg"].isinf().all()


def test_catching_up_bumps_the_versions_of_what_it_writes() -> None:
    """The averages of all tables, and no parameter: a graph through those goes on."""
    tables = Tables([(9, 4), (7, 4)])
    optimizer = triton_optim.RMSprop(tables.params, sparse="lazy")
    tables.new_gradients([2, 2])
    optimizer.step()
    averages = [optimizer.state[param]["square_avg"] for param in tables.params]
    versions = [average._version for average in averages]
    loss = torch.stack([(param * param).sum() for param in tables.params]).sum()
    optimizer.state_dict()
    assert all(a._version > v for a, v in zip(averages, versions, strict=True))
    loss.backward()
