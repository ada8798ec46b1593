"""RMSprop on sparse gradients: equal to dense RMSprop at the cost of the rows that are touched."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import DEVICE, assert_same_bits, refused
from embedding_tables import Tables, sparse, worst
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import record_launches

centered_or_not = pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])


def _pair(
    centered: bool = False, shapes: tuple[tuple[int, ...], ...] = ((30, 4),), **kwargs: Any
) -> tuple[list[Tables], list[Any]]:
    """Ours, lazy, and torch's, which is given dense gradients."""
    runs = [Tables(shapes), Tables(shapes)]
    kwargs = {"lr": 0.01, "centered": centered, **kwargs}
    ours = triton_optim.RMSprop(runs[0].params, sparse="lazy", **kwargs)
    return runs, [ours, torch.optim.RMSprop(runs[1].params, foreach=False, **kwargs)]


def _step(runs: list[Tables], optimizers: list[Any], count: int = 5) -> None:
    for run, optimizer in zip(runs, optimizers, strict=True):
        run.new_gradients([count] * len(run.params))
        for param in run.params if run is runs[1] else []:
            assert param.grad is not None
            param.grad = param.grad.to_dense()
        optimizer.step()


def _check(runs: list[Tables], optimizers: list[Any]) -> None:
    assert worst(runs[0].params, runs[1].params) < 1e-12
    ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-12, atol=1e-12)


@centered_or_not
def test_a_thousand_steps_equal_dense_ones(centered: bool) -> None:
    """Of 200 rows, three a step, some left out for hundreds of steps, one for all of them."""
    runs, optimizers = _pair(centered, ((200, 4),), alpha=0.999)
    for step in range(1000):
        for run, optimizer in zip(runs, optimizers, strict=True):
            (param,) = run.params
            ids = [step % 7, 7 + (step * step) % 192, 7]
            grad = sparse(ids, run.draw(3, 4), param)
            param.grad = grad if run is runs[0] else grad.to_dense()
            optimizer.step()
        if step % 100 == 99:
            assert worst(runs[0].params, runs[1].params) < 1e-12
    gaps = 1000 - optimizers[0].state[runs[0].params[0]]["last_step"]
    assert gaps.min() == 0
    assert gaps.max() == 1000
    _check(runs, optimizers)


@centered_or_not
def test_errors_in_float32_are_of_its_rounding(centered: bool) -> None:
    runs = [Tables([(30, 4)], torch.float32), Tables([(30, 4)], torch.float32, torch.float64)]
    kwargs: dict[str, Any] = {"lr": 0.01, "centered": centered, "alpha": 0.9}
    optimizers = [
        triton_optim.RMSprop(runs[0].params, sparse="lazy", **kwargs),
        torch.optim.RMSprop(runs[1].params, foreach=False, **kwargs),
    ]
    for _ in range(30):
        _step(runs, optimizers)
    assert worst(runs[0].params, runs[1].params) < 1e-5
    for name in ("square_avg", *(["grad_avg"] if centered else [])):
        ours, exact = (o.state_dict()["state"][0][name] for o in optimizers)
        assert worst([ours], [exact]) < 1e-6


def test_only_touched_rows_are_written_in_one_launch() -> None:
    """The sanitizer sees every other store."""
    runs, optimizers = _pair(shapes=((30, 4), (10, 4)))
    for _ in range(3):
        with record_launches() as launches:
            _step(runs, optimizers)
        assert [launch.name for launch in launches] == ["keys_kernel", "rows_kernel"]
    state = optimizers[0].state[runs[0].params[0]]
    assert list(state) == ["step", "square_avg", "last_step"]
    assert (state["last_step"].dtype, state["last_step"].shape) == (torch.int32, (30,))


@centered_or_not
def test_torch_goes_on_from_our_state_dict_and_we_from_its(centered: bool) -> None:
    runs, optimizers = _pair(centered)
    for _ in range(10):
        _step(runs, optimizers)
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
        _step(runs, [ours, optimizers[1]])
    _check(runs, [ours, optimizers[1]])


@centered_or_not
def test_dense_gradients_in_between(centered: bool) -> None:
    runs, optimizers = _pair(centered)
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
    _check(runs, optimizers)


def test_a_changed_alpha_holds_from_then_on() -> None:
    runs, optimizers = _pair(alpha=0.9)
    for step in range(9):
        if step in (3, 6):
            for optimizer in optimizers:
                optimizer.param_groups[0]["alpha"] = 0.5 + 0.05 * step
        _step(runs, optimizers, count=2)
    for optimizer in optimizers:
        optimizer.param_groups[0]["alpha"] = 0.1  # and is not that of the steps before
    _check(runs, optimizers)
    _step(runs, optimizers)
    _check(runs, optimizers)


def test_copies_go_on_alike() -> None:
    runs, optimizers = _pair()
    for _ in range(4):
        _step(runs, optimizers, count=2)
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
    runs, optimizers = _pair()
    _step(runs, optimizers)
    (param,) = runs[0].params
    before = copy.deepcopy([param.detach(), dict(optimizers[0].state[param])])
    runs[0].new_gradients([5])
    optimizers[0].found_inf = torch.ones((), device=DEVICE)
    optimizers[0].step()
    del optimizers[0].found_inf
    assert_same_bits([param.detach(), dict(optimizers[0].state[param])], before)
    runs[1].new_gradients([5])  # as many numbers drawn
    for _ in range(3):
        _step(runs, optimizers)
    _check(runs, optimizers)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 0.9}, "does not go with momentum"),
        ({"weight_decay": 0.1}, "does not go with weight_decay"),
        ({"foreach": True}, "does not go with foreach=True"),
        ({"differentiable": True}, "does not go with differentiable=True"),
        ({"fused": False}, "does not go with fused=False"),
        ({"max_grad_norm": 1.0}, "does not go with max_grad_norm"),
        ({"capturable": True}, "does not go with capturable=True"),
        ({"alpha": torch.tensor(0.9)}, "does not go with a tensor as alpha"),
        ({"sparse": "eager"}, "Invalid sparse value: 'eager'"),
    ],
    ids=str,
)
def test_what_it_excludes_is_refused_at_construction(kwargs: dict[str, Any], message: str) -> None:
    param = Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=message):
        triton_optim.RMSprop([param], **{"sparse": "lazy", **kwargs})
    optimizer = triton_optim.RMSprop([param], sparse="lazy")
    if "momentum" in kwargs or "weight_decay" in kwargs:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": Parameter(torch.ones(2)), **kwargs})
        assert len(optimizer.param_groups) == 1


def test_what_is_changed_into_that_later_is_refused_at_the_step() -> None:
    runs, optimizers = _pair()
    _step(runs, optimizers)
    optimizers[0].param_groups[0]["weight_decay"] = 0.1
    runs[0].new_gradients([3])
    message = "sparse='lazy' cannot take parameter 0 of group 0: weight_decay, which moves every"
    with refused(message, optimizers[0], runs[0].params):
        optimizers[0].step()


@pytest.mark.parametrize("change", ["foreach", "momentum"])
def test_averages_that_lag_are_not_left_to_torch(change: str) -> None:
    runs, optimizers = _pair()
    _step(runs, optimizers)
    (param,) = runs[0].params
    param.grad = torch.ones_like(param)
    optimizers[0].param_groups[0][change] = 0.5 if change == "momentum" else True
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        optimizers[0].step()
    assert_same_bits(param.detach(), before)
    if change == "foreach":
        saved = optimizers[0].state_dict()
        optimizers[0].load_state_dict(saved)
        optimizers[0].step()


def test_steps_beyond_what_float32_counts() -> None:
    runs, optimizers = _pair(alpha=0.9)
    _step(runs, optimizers)
    (param,) = runs[0].params
    state = optimizers[0].state[param]
    state["step"].fill_(2**24)
    state["last_step"].fill_(2**24)
    for _ in range(6):
        _step(runs, optimizers, count=2)
    assert state["step"] == 2**24 + 6
    saved = optimizers[0].state_dict()["state"][0]
    exact = optimizers[1].state[runs[1].params[0]]
    torch.testing.assert_close(saved["square_avg"], exact["square_avg"], rtol=1e-12, atol=1e-12)
    assert saved["step"].dtype == torch.float32
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    assert optimizers[0].state[param]["step"].dtype == torch.float64


def test_a_state_dict_writes_no_parameter() -> None:
    """A backward pass may follow."""
    runs, optimizers = _pair()
    for _ in range(3):
        _step(runs, optimizers, count=2)
    (param,) = runs[0].params
    loss, before = param.square().sum(), param.detach().clone()
    optimizers[0].state_dict()
    loss.backward()
    assert_same_bits(param.detach(), before)


def test_state_with_gaps_and_damaged_state() -> None:
    runs, optimizers = _pair()
    for _ in range(3):
        _step(runs, optimizers, count=2)
    (param,) = runs[0].params
    state = optimizers[0].state[param]
    wide = torch.cat((state["square_avg"], torch.full_like(param, 7.0)), 1)
    state["square_avg"] = wide[:, :4]
    _check(runs, optimizers)
    assert (wide[:, 4:] == 7).all()
    state["last_step"] = state["last_step"][:-1]
    with pytest.raises(
        RuntimeError, match=r"state 'last_step' of parameter 0 of group 0 has shape"
    ):
        optimizers[0].state_dict()


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


def test_it_does_not_step_in_backward() -> None:
    model = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = triton_optim.RMSprop(model.parameters(), sparse="lazy")
    with pytest.raises(RuntimeError, match="sparse='lazy' makes good what rows missed"):
        triton_optim.step_in_backward(model, optimizer)


def test_without_kernels_it_says_so() -> None:
    """On the CPU, without the interpreter."""
    program = """
import torch, triton_optim
param = torch.nn.Parameter(torch.ones(3, 2))
optimizer = triton_optim.RMSprop([param], sparse="lazy")
param.grad = torch.ones(3, 2)
optimizer.step()
param.grad = torch.ones(3, 2).to_sparse(1)
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(
        "sparse='lazy' cannot take parameter 0 of group 0: it is on cpu, where the kernels do not "
        "run; use the kernels, which run on a GPU and under TRITON_INTERPRET=1, or go on from"
    )


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


def test_a_bad_alpha_is_mended() -> None:
    tables = Tables([(9, 4)])
    optimizer = triton_optim.RMSprop(tables.params, sparse="lazy")
    tables.new_gradients([2])
    optimizer.step()
    optimizer.param_groups[0]["alpha"] = "0.9"
    with pytest.raises(TypeError, match="alpha of group 0"):
        optimizer.step()
    optimizer.param_groups[0]["alpha"] = 0.9
    optimizer.step()
    optimizer.state_dict()
