"""Sparse gradients that the kernels do not take: errors, and torch's own implementation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from assertions import assert_same_bits, raises
from cases import DEVICE, Case, grad_of, interpreted, new_param
from embedding_tables import ADAGRAD, Tables, every_sparse_case, launches_of, sparse, worst
from torch.nn import Parameter

import triton_optim
from triton_optim.step import row_wise, validation


@interpreted
@every_sparse_case
@pytest.mark.parametrize("bad", [-1, 12, -(2**40), 2**40])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_rows_that_are_not_there_raise(case: Case, bad: int, steps_before: int) -> None:
    """On the CPU, where that can be known; nothing is written, of the dense parameter neither."""
    tables = Tables([(12, 3), (4, 3)])
    optimizer = case.ours(tables.params)
    for _ in range(steps_before):
        tables.new_gradients([5, 5])
        optimizer.step()
    tables.new_gradients([5, 5])
    tables.params[0].grad = sparse([3, bad, 2], tables.draw(3, 3), tables.params[0])
    message = rf"parameter 0 of group 0 has a row {bad}, the parameter 12 rows"
    with raises(message, optimizer, tables.params):
        optimizer.step()


@every_sparse_case
def test_rows_that_are_not_there_are_never_written(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be known, as on a GPU: the others are stepped, of this table and the next."""
    monkeypatch.setattr(row_wise, "check_indices", lambda *_: None)
    monkeypatch.setattr("triton_optim.step.planning.check_indices", lambda *_: None)
    bad = [-1, 12, 13, -(2**40), 2**40, 2**62, -(2**63)]
    good = [0, 11, 3, 3]
    runs = [Tables([(12, 3), (4, 3)]), Tables([(12, 3), (4, 3)])]
    optimizers = [case.ours(runs[0].params), case.theirs(runs[1].params)]
    for _ in range(2):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([0, 6])
            values = run.draw(40 * len(bad) + 4, 3)
            values[: 40 * len(bad)] *= 1e6
            ids = [*bad * 40, *good] if run is runs[0] else good
            param = run.params[0]
            param.grad = sparse(ids, values[-len(ids) :], param)
            if run is runs[1]:
                param.grad = sparse(ids, values[-4:], param)
            optimizer.step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


def test_one_row_that_is_not_there_within_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_optim.step.planning.check_indices", lambda *_: None)
    runs = [Tables([(12, 3)]), Tables([(12, 3)])]
    for run, ids in zip(runs, ([3, 12, 11], [3, 11]), strict=True):
        (param,) = run.params
        param.grad = sparse(ids, torch.ones(len(ids), 3, dtype=torch.float64), param)
    ADAGRAD.ours(runs[0].params).step()
    ADAGRAD.theirs(runs[1].params).step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RowwiseAdagrad"])
def test_rows_that_are_not_there_raise_in_the_fallback(name: str) -> None:
    """At every step, before it writes."""
    param = Parameter(torch.ones(3, 2))
    optimizer = getattr(triton_optim, name)([param], fused=False)
    param.grad = sparse([0], torch.ones(1, 2), param).cpu()
    optimizer.step()
    for bad in (-1, 3, 10**9):
        param.grad = sparse([0, bad], torch.ones(2, 2), param).cpu()
        with raises(f"has a row {bad}, the parameter 3 rows", optimizer, [param]):
            optimizer.step()


def test_what_the_kernels_do_not_take() -> None:
    """Falls back to torch: two sparse dims, a parameter that is not contiguous, wide rows."""
    shapes = {"two sparse dims": (6, 5), "not contiguous": (6, 5), "wide": (3, 4097)}
    for kind, shape in shapes.items():
        params = [Parameter(torch.ones(shape, device=DEVICE)) for _ in range(2)]
        if kind == "not contiguous":
            params = [Parameter(torch.ones(shape[::-1], device=DEVICE).t()) for _ in range(2)]
        for param in params:
            n_dims = 2 if kind == "two sparse dims" else 1
            param.grad = torch.ones_like(param).contiguous().to_sparse(n_dims)
        ours, theirs = ADAGRAD.ours([params[0]]), ADAGRAD.theirs([params[1]])
        for _ in range(2):
            assert launches_of(ours) == []
            theirs.step()
        assert_same_bits(params[0].detach(), params[1].detach())
        with pytest.raises(RuntimeError, match=r"`fused=True` cannot be kept for parameter 0"):
            ADAGRAD.ours([params[0]], fused=True).step()


def test_weight_decay_and_momentum_are_torchs() -> None:
    """Adagrad refuses decay, SGD too; momentum of SGD makes a sparse buffer."""
    for case in (
        Case("", "Adagrad", {"weight_decay": 0.1}),
        Case("", "SGD", {"weight_decay": 0.1}),
        Case("", "RMSprop", {}),
    ):
        messages = []
        for make in (case.theirs, case.ours):
            tables = Tables([(12, 3)])
            tables.new_gradients([4])
            before = tables.params[0].detach().clone()
            with pytest.raises(RuntimeError) as caught:
                make(tables.params).step()
            messages.append(str(caught.value))
            assert_same_bits(tables.params[0].detach(), before)
        assert messages[0] == messages[1]
    runs = [Tables([(12, 3)]), Tables([(12, 3)])]
    momentum = Case("", "SGD", {"lr": 0.1, "momentum": 0.9})
    optimizers = [momentum.ours(runs[0].params), momentum.theirs(runs[1].params)]
    for _ in range(3):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([5])
            optimizer.step()
    assert_same_bits(runs[0].params[0].detach(), runs[1].params[0].detach())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm takes no torch.sparse_coo gradient"),
        pytest.param(
            {"capturable": True}, "would repeat those of this step", marks=pytest.mark.gpu
        ),
    ],
)
def test_options_that_sparse_gradients_exclude(kwargs: dict[str, Any], message: str) -> None:
    tables = Tables([(12, 3)])
    tables.new_gradients([4])
    optimizer = ADAGRAD.ours(tables.params, **kwargs)
    with raises(message, optimizer, tables.params):
        optimizer.step()


def test_more_rows_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("launch.row_launcher", "step.routing", "step.row_wise"):
        monkeypatch.setattr(f"triton_optim.{module}.MAX_NNZ", 10)
    param = Parameter(torch.ones(11, device=DEVICE))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="it or its gradient has more than 10 rows"):
        triton_optim.RowwiseAdagrad([param], fused=True).step()
    tables = Tables([(9, 4), (9, 4)])
    tables.new_gradients([11, 1])
    with pytest.raises(RuntimeError, match="it or its gradient has more than 10 rows"):
        ADAGRAD.ours(tables.params, fused=True).step()
    tables.new_gradients([8, 8])
    with raises("have 16 rows together, more than 10", ADAGRAD.ours(tables.params), tables.params):
        ADAGRAD.ours(tables.params).step()


def test_check_ids_knows_every_sparse_dim() -> None:
    ids = torch.tensor([[0, 2], [3, 4]])
    validation.check_indices(ids, (3, 5, 7), "p")
    with pytest.raises(RuntimeError, match="p has a row 4, the parameter 4 rows"):
        validation.check_indices(ids, (3, 4, 7), "p")


def test_a_sparse_gradient_has_no_norm() -> None:
    param = new_param(5)
    other = Parameter(torch.ones(4, 3, device=DEVICE))
    other.grad = torch.ones(4, 3, device=DEVICE).to_sparse(1)
    optimizer = triton_optim.SGD([param, other], max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"max_grad_norm takes no torch\.sparse_coo gradient"):
        optimizer.step()


def test_a_failing_sort_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As out of memory: the dense parameter of the same step, too."""
    tables = Tables([(12, 4), (12, 4)])
    optimizer = ADAGRAD.ours(tables.params)
    for step in range(2):
        tables.new_gradients([9, 9])
        tables.params[1].grad = grad_of(tables.params[1]).to_dense()
        if step == 1:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "sort", None)
                before = copy.deepcopy(
                    [[p.detach() for p in tables.params], optimizer.state_dict()]
                )
                with pytest.raises(TypeError):
                    optimizer.step()
            assert_same_bits([[p.detach() for p in tables.params], optimizer.state_dict()], before)
        optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())
