"""Launches over rows: duplicates over several programs, the order of programs, the sort, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, Case, grad_of
from embedding_tables import ADAGRAD, SPARSE_CASES, Tables, launches_of, sparse, worst
from lab.traffic import Traffic, watched
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import row_chunking, tuning
from triton_optim.launch.launcher import Launch
from triton_optim.launch.row_launcher import RowLaunch, RowVariant


def test_tables_of_other_widths_have_launches_of_their_own() -> None:
    shapes = [(9, 8), (9, 3), (9, 7), (9,), (9, 4)]
    runs = [Tables(shapes), Tables(shapes)]
    ours, theirs = ADAGRAD.ours(runs[0].params), ADAGRAD.theirs(runs[1].params)
    for run in runs:
        run.new_gradients([20] * 5)
    launches = [launch for launch in launches_of(ours) if isinstance(launch, RowLaunch)]
    assert sorted(launch.variant.columns for launch in launches) == [1, 4, 8]
    theirs.step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


def _in_order(monkeypatch: pytest.MonkeyPatch, order: Sequence[int]) -> None:
    """Let the update's programs run in this order."""
    from triton.runtime import interpreter

    run = Launch.run

    def launched(launch: Launch, **changed: Any) -> None:
        if not isinstance(launch, RowLaunch):
            run(launch, **changed)
            return
        turns = iter([i for i in order if i < launch.grid[0]])
        set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
        with monkeypatch.context() as patch:
            patch.setattr(
                interpreter.InterpreterBuilder,
                "set_grid_idx",
                lambda self, *_: set_grid_idx(self, next(turns), 0, 0),
            )
            run(launch, **changed)

    monkeypatch.setattr(Launch, "run", launched)


@pytest.mark.interpreted
def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 to 70 duplicates, over up to five programs."""
    results = []
    for order in (range(100), range(99, -1, -1), [*range(1, 100, 2), *range(0, 100, 2)]):
        tables = Tables([(6, 8), (5, 8)], torch.float32)
        optimizer = ADAGRAD.ours(tables.params)
        with monkeypatch.context() as patch:
            _in_order(patch, order)
            for _ in range(3):
                tables.new_gradients([100, 90], hot=70)
                (_, update) = launches_of(optimizer)
                assert update.grid[0] == 13
        results.append([[p.detach() for p in tables.params], optimizer.state_dict()])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("width", [40, 20, 9, 2])
def test_rows_over_several_programs(width: int) -> None:
    """In blocks of 1, 2, 4 and 32 rows: every number of chunks that a row can have."""
    runs = [Tables([(5, width), (9, width)]), Tables([(5, width), (9, width)])]
    optimizers = [ADAGRAD.ours(runs[0].params, fused=True), ADAGRAD.theirs(runs[1].params)]
    for counts in ([1, 2], [33, 9], [4, 140], [80, 3]):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients(counts, hot=30)
            optimizer.step()
        assert worst(runs[0].params, runs[1].params) < 1e-12


def test_the_sort_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or duplicates would be added in any order. On a CPU all sorts happen to be."""
    asked = []
    sort: Any = torch.sort

    def asking(keys: Tensor, **kwargs: bool) -> Any:
        asked.append(kwargs)
        return sort(keys, **kwargs)

    monkeypatch.setattr(torch, "sort", asking)
    tables = Tables([(8, 4)])
    tables.new_gradients([20])
    ADAGRAD.ours(tables.params).step()
    assert asked == [{"stable": True}]


def test_one_row_a_hundred_thousand_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among others; the sum of its gradients is that of float64 to float32's rounding."""
    if DEVICE == "cpu":  # larger programs than other tests have, or it takes minutes
        monkeypatch.setattr("triton_optim.launch.row_launcher.INTERPRETED_ELEMENTS", 1 << 14)
    monkeypatch.setattr(tuning, "PROGRAMS", 16)
    param = Parameter(torch.zeros(1000, 4, device=DEVICE))
    values = torch.rand(100_500, 4, device=DEVICE)
    ids = torch.full((100_500,), 500, device=DEVICE)
    ids[::201] = torch.arange(500, device=DEVICE) * 2 + 1
    param.grad = sparse(ids, values, param)
    launches = launches_of(triton_optim.SGD([param], lr=1.0))
    assert launches[-1].grid[0] > 10
    exact = torch.zeros(1000, 4, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, ids, values.double())
    relative = ((param + exact).abs() / exact.clamp(min=1e-9)).max()
    assert relative < 1e-6, relative
    others = torch.arange(0, 1000, 2, device=DEVICE)
    assert not param.detach()[others[others != 500]].any()


def test_keys_of_more_rows_than_an_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most in (row_chunking.MAX_KEYS, 64):
        monkeypatch.setattr(row_chunking, "MAX_KEYS", most)
        tables = Tables([(40, 4), (30, 4)], torch.float32)
        optimizer = ADAGRAD.ours(tables.params)
        tables.new_gradients([90, 20], hot=30)
        (keys, _) = launches_of(optimizer)
        dtype = torch.int32 if most > 64 else torch.int64
        assert keys.arguments["keys_ptr"].dtype == dtype
        results.append([param.detach() for param in tables.params])
    assert_same_bits(results[1], results[0])


def test_what_a_kernel_is_compiled_for() -> None:
    """Elements that are loaded together: as many as address and width allow."""
    variant = RowVariant(
        True, frozenset(), 1, "bfloat16", "float32", "bfloat16", None, 16, reads_step=False
    )
    for addresses, widths, multiple in (
        ([16, 64], [16, 8], 8),
        ([16, 64], [12], 4),
        ([16, 64], [16, 10], 2),
        ([16, 64], [15], 1),
        ([16, 72], [16], 1),
    ):
        assert variant.loading(addresses, widths).multiple == multiple


@pytest.mark.interpreted  # compiled, several threads load one key
@pytest.mark.parametrize("case", [ADAGRAD, SPARSE_CASES[0]], ids=lambda case: case.name)
def test_bytes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values once, rows of parameter and state once in and once out, ids and order beside them."""
    monkeypatch.undo()
    width, n_rows, count = 64, 5000, 3000
    tables = Tables([(n_rows, width)], torch.float32)
    tables.new_gradients([count], hot=100)
    (param,) = tables.params
    touched = len(grad_of(param)._indices().unique())
    with watched((traffic := Traffic()).count):
        case.ours([param], fused=True).step()
    n_tensors = 2 if case.optimizer == "Adagrad" else 1
    floor = 4 * width * (count + 2 * n_tensors * touched)
    total = traffic.loaded + traffic.stored
    # Ids 8 bytes, keys written 4 and read twice, the order 8; and some tables.
    assert 0 < total - floor < 32 * count + 2000
    assert total < 1.05 * floor
