"""Sparse gradients: the same as torch's for-loop, in one sort and one update launch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from assertions import assert_same_bits, largest, updates_among
from cases import DEVICE, Case, grad_of
from embedding_tables import ADAGRAD, Tables, every_sparse_case, launches_of, sparse, worst
from torch import Tensor
from torch.nn import Parameter


@every_sparse_case
@pytest.mark.parametrize(
    ("dtype", "dense"),
    [
        (torch.float32, (1,)),
        (torch.float32, (3,)),
        (torch.float32, (16,)),
        (torch.float32, (2, 5)),
        (torch.bfloat16, (8,)),
        (torch.float16, (6,)),
        (torch.float64, (2, 4)),
    ],
    ids=str,
)
def test_errors_are_no_larger_than_torchs(
    case: Case, dtype: torch.dtype, dense: tuple[int, ...]
) -> None:
    runs = [
        Tables([(20, *dense)], dtype),
        Tables([(20, *dense)], dtype),
        Tables([(20, *dense)], dtype, torch.float64),
    ]
    makes = (case.ours, case.theirs, case.theirs)
    optimizers = [make(run.params) for make, run in zip(makes, runs, strict=True)]
    for count in (7, 50, 33):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([count], hot=20)
            optimizer.step()
    ours, theirs, exact = (run.params for run in runs)
    unit = torch.finfo(dtype).eps * largest(exact[0])
    # in float64 torch is the reference, whose coalesce() adds up in another order
    units = 8 if dtype == torch.float64 else 1
    assert worst(ours, exact) <= worst(theirs, exact) + units * unit
    if case.optimizer == "Adagrad":
        sums = [[o.state[r.params[0]]["sum"]] for o, r in zip(optimizers, runs, strict=True)]
        unit = torch.finfo(dtype).eps * largest(sums[2][0])
        assert worst(sums[0], sums[2]) <= worst(sums[1], sums[2]) + 4 * unit


@every_sparse_case
def test_a_vector(case: Case) -> None:
    """Beside dense gradients, whose zeros move nothing: torch's sum is wrong for some vectors."""
    runs = [Tables([(40,)]), Tables([(40,)])]
    optimizers = [case.ours(runs[0].params, fused=True), case.theirs(runs[1].params)]
    for count in (7, 90):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([count], hot=20)
            if run is runs[1]:
                run.params[0].grad = grad_of(run.params[0]).to_dense()
            optimizer.step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


@every_sparse_case
def test_one_launch_for_all_tables(case: Case) -> None:
    """Of several groups and rates, whatever the number of rows; one sort, and no other plan."""
    shapes = [(50, 8), (3, 8), (1000, 8), (7, 8)]
    runs = [Tables(shapes), Tables(shapes)]
    groups = [[{"params": r.params[:2]}, {"params": r.params[2:], "lr": 0.01}] for r in runs]
    ours, theirs = case.ours(groups[0], fused=True), case.theirs(groups[1])
    plans = []
    for counts in ([40, 1, 90, 0], [3, 5, 0, 200], [0, 0, 0, 1]):
        for run in runs:
            run.new_gradients(counts, hot=10)
        names = [launch.name for launch in updates_among(launches_of(ours))]
        assert names == ["keys_kernel", "rows_kernel"]
        theirs.step()
        plans.append(ours._stepper.plan)
        torch.testing.assert_close(runs[0].params, runs[1].params, rtol=1e-12, atol=1e-12)
    assert plans[0] is plans[1] is plans[2]


def test_dense_and_sparse_gradients_side_by_side() -> None:
    """And in turn, of one parameter, or none."""
    runs = [Tables([(20, 4), (5, 4)]), Tables([(20, 4), (5, 4)])]
    ours, theirs = ADAGRAD.ours(runs[0].params), ADAGRAD.theirs(runs[1].params)
    for step in range(8):
        for run, optimizer in zip(runs, (ours, theirs), strict=True):
            run.new_gradients([30, 5])
            for i, param in enumerate(run.params):
                assert param.grad is not None
                kind = (step >> i) % 3
                param.grad = (param.grad, param.grad.to_dense(), None)[kind]
            optimizer.step()
        assert worst(runs[0].params, runs[1].params) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    """Of one gradient among many of its row, over several programs."""
    tables = Tables([(8, 4)], torch.float32)
    (param,) = tables.params
    tables.new_gradients([200], hot=90)
    ids, values = grad_of(param)._indices()[0], grad_of(param)._values()
    for row in (4, 1):
        values[(ids == row).nonzero()[3]] = bad
    ADAGRAD.ours([param], fused=True).step()
    finite = torch.isfinite(param.detach()).all(1)
    assert finite.tolist() == [True, False, True, True, False, True, True, True]


@every_sparse_case
def test_rows_without_a_gradient_keep_their_bits(case: Case) -> None:
    """NaN and all; that nothing stores to them is what the sanitizer sees."""
    tables = Tables([(40, 4)], torch.float32)
    (param,) = tables.params
    optimizer = case.ours([param], fused=True)
    tables.new_gradients([9])
    optimizer.step()
    with torch.no_grad():
        param[1::2] = math.nan
        if case.optimizer == "Adagrad":
            optimizer.state[param]["sum"][1::2] = -math.inf
    before = copy.deepcopy([param.detach(), dict(optimizer.state_dict()["state"])])
    ids = [0, 4, 4, 38, 0]
    param.grad = sparse(ids, tables.draw(5, 4), param)
    optimizer.step()
    after = [param.detach(), dict(optimizer.state_dict()["state"])]
    for a, b in zip(_tensors(after), _tensors(before), strict=True):
        if a.dim():
            a[[0, 4, 38]] = b[[0, 4, 38]]
            assert_same_bits(a.view(torch.int32), b.view(torch.int32))


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    values = nested.values() if isinstance(nested, dict) else nested
    return [t for v in values if isinstance(v, Tensor | dict | list) for t in _tensors(v)]


@every_sparse_case
def test_an_empty_gradient_is_a_step_that_only_counts(case: Case) -> None:
    tables = Tables([(12, 3)])
    (param,) = tables.params
    optimizer = case.ours([param], fused=True)
    for counted in (1, 2):
        before = param.detach().clone()
        tables.new_gradients([0])
        assert updates_among(launches_of(optimizer)) == []
        assert_same_bits(param.detach(), before)
        if case.optimizer == "Adagrad":
            state = optimizer.state[param]
            assert state["step"] == counted
            assert (state["sum"] == case.kwargs.get("initial_accumulator_value", 0)).all()
        else:
            assert not optimizer.state


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_tables(shape: tuple[int, ...]) -> None:
    param = Parameter(torch.zeros(shape, device=DEVICE))
    optimizer = ADAGRAD.ours([param], fused=True)
    count = 2 if shape[0] else 0
    param.grad = sparse([0] * count, torch.zeros(count, *shape[1:], device=DEVICE), param)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
