"""What the benchmark of sparse gradients steps: ids, gradients, bytes, and how it is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE
from lab import sparse_work
from lab.implementations import OURS
from lab.sparse_implementations import (
    ADAGRAD,
    IMPLEMENTATIONS,
    LAZY_RMSPROP,
    ROWWISE,
    RULES,
    SGD,
    Implementation,
    Rule,
    Stepped,
    reference,
)
from lab.sparse_work import CHECKED, Embeddings, Shape, check, tolerance
from sparse_benchmark import TINY, torchs
from torch import Tensor, nn

INSTALLED = [item for item in IMPLEMENTATIONS if item.version() is not None]


def _drawn(shape: Shape) -> Tensor:
    return sparse_work.ids_of(shape, DEVICE, torch.Generator(DEVICE).manual_seed(0))()


def test_zipf_is_zipf() -> None:
    n, n_ids = 1000, 200_000
    ids = _drawn(Shape(n, 1, n_ids, "zipf"))
    counts = ids.bincount(minlength=n)
    assert len(counts) == n
    shares = [rank**-sparse_work.ZIPF_EXPONENT for rank in range(1, n + 1)]
    frequent = counts.sort(descending=True)
    for share, count in zip(shares[:20], frequent.values.tolist(), strict=False):
        expected = n_ids * share / sum(shares)
        assert abs(count - expected) < 5 * math.sqrt(expected)
    hot = frequent.indices[:20].sort().values
    assert hot.diff().min() > 1  # no two of them side by side


@pytest.mark.parametrize("n", [1, 2, 97, 100])
def test_every_row_is_drawn(n: int) -> None:
    for distribution in sparse_work.DISTRIBUTIONS:
        ids = _drawn(Shape(n, 1, 40_000, distribution))
        assert ids.dtype == torch.int64
        assert ids.unique().tolist() == [*range(n)]


def test_uniform_is_uniform() -> None:
    counts = _drawn(Shape(100, 1, 100_000, "uniform")).bincount(minlength=100)
    assert ((counts - 1000).abs() < 6 * math.sqrt(1000)).all()


def test_gradients_are_those_of_an_embedding() -> None:
    work = Embeddings(TINY, DEVICE)
    for ids, grads in zip(work.ids, work.grads, strict=True):
        for table, indices, values, made in zip(work.tables, ids, work.values, grads, strict=True):
            module = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
            module(indices).backward(values)
            grad = module.weight.grad
            assert grad is not None
            for sparse in (made, grad):
                assert sparse.layout == torch.sparse_coo and not sparse.is_coalesced()
                assert sparse.shape == table.shape
                assert torch.equal(sparse._indices(), indices[None])
                assert torch.equal(sparse._values(), values)
            assert len(indices.unique()) < len(indices)


def test_values_add_up_exactly_and_stay_where_they_are() -> None:
    shape = Shape(3, 4, 5000, "uniform")
    work = Embeddings(shape, DEVICE)
    (values,) = work.values
    before, address = values.clone(), values.data_ptr()
    work.new_values()
    assert not torch.equal(values, before) and values.data_ptr() == address
    assert (8 * values).unique().tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert work.grads[0][0]._values().data_ptr() == address
    every = torch.arange(3, device=DEVICE)
    summed = work.summed(1, 0, every)
    assert torch.equal(work.grads[1][0].to_dense().double(), summed)
    assert torch.equal(work.summed(1, 0, every[1:2]), summed[1:2])


def test_touched_rows_and_bytes_by_hand() -> None:
    shape = Shape(10, 4, 3, "uniform", tables=2)
    work = Embeddings(shape, DEVICE)
    one, two = (torch.tensor(ids, device=DEVICE) for ids in ([7, 1, 7], [0, 0, 0]))
    work.ids = [[one, two]] * sparse_work.BATCHES
    assert work.counted() == (3, 3)
    # Read: 2 gradients of 3 rows of 4 numbers; and of 3 rows, twice: 4 of the parameter, and state.
    found = [rule.step_bytes(shape, 3) for rule in (SGD, ADAGRAD, ROWWISE, LAZY_RMSPROP)]
    assert found == [4 * (24 + 6 * numbers) for numbers in (4, 4 + 4, 4 + 1, 4 + 4 + 1)]
    assert (shape.table_bytes, shape.value_bytes) == (2 * 160, 2 * 48)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_our_state_is_what_is_counted(rule: Rule) -> None:
    (ours,) = (item for item in IMPLEMENTATIONS if (item.rule, item.name) == (rule, OURS))
    candidate: Any = ours.build(Embeddings(TINY, DEVICE))
    candidate.load(0)
    candidate.step()
    states = candidate.step.__self__.state.values()
    kept = sum(value.nbytes for state in states for value in state.values() if value.dim())
    assert kept == rule.kept_bytes(TINY) == ours.kept_bytes(TINY)


def test_checked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Embeddings(Shape(10_000, 1, 5000, "zipf", tables=2), DEVICE)
    assert [len(probes) for probes in Embeddings(TINY, DEVICE).probes()] == [50, 50]
    monkeypatch.setattr(sparse_work, "PROBED", 64)
    for table, probes in enumerate(work.probes()):
        touched = torch.cat([work.ids[batch][table] for batch in sorted({*CHECKED})])
        frequent = touched.bincount().topk(sparse_work.FREQUENT).indices
        assert probes.tolist() == sorted(set(probes.tolist()))
        assert {0, 9999, *frequent.tolist()} <= {*probes.tolist()}
        n_touched = int(torch.isin(probes, touched).sum())
        assert n_touched >= 32 and len(probes) - n_touched >= 16
        assert len(probes) <= 64 + 2 + sparse_work.FREQUENT


@pytest.mark.parametrize("item", INSTALLED, ids=lambda item: item.key)
@pytest.mark.parametrize("shape", [TINY, Shape(5000, 12, 300, "uniform")], ids=str)
def test_the_check_passes_what_is_right(item: Implementation, shape: Shape) -> None:
    work = Embeddings(shape, DEVICE)
    most = work.counted()[1]
    assert (
        0
        < check(work, item.build(work), reference(item.rule))
        <= tolerance(1 if item.sums else most)
    )


def test_duplicates_that_are_added_one_by_one_round_as_often() -> None:
    work = Embeddings(Shape(3, 4, 200_000, "uniform"), DEVICE)
    most = work.counted()[1]
    (item,) = (i for i in IMPLEMENTATIONS if not i.sums)
    error = check(work, item.build(work), reference(item.rule))
    # Where torch sums them first, as it may on a GPU, the error is smaller.
    assert (tolerance() < error or DEVICE == "cuda") and error <= tolerance(most)


def test_the_check_gives_every_step_new_gradients() -> None:
    work = Embeddings(TINY, DEVICE)
    seen: list[tuple[Tensor, Tensor]] = []

    class Seeing(Stepped):
        def load(self, batch: int) -> None:
            super().load(batch)
            grad = self._work.grads[batch][0]
            seen.append((grad._indices().clone(), grad._values().clone()))

    check(work, Seeing(work, torchs(SGD)), reference(SGD))
    (ids, values), *others = seen
    assert [torch.equal(ids, other) for other, _ in others] == [False, True]
    assert not any(torch.equal(values, other) for _, other in others)


class _Faulty(Stepped):
    """torch's sparse Adagrad, which does something to gradients or tables before it steps."""

    def __init__(self, work: Embeddings, spoil: Callable[[list[nn.Parameter]], None]) -> None:
        super().__init__(work, torchs(ADAGRAD))
        right = self.step

        def step() -> object:
            with torch.no_grad():
                spoil(self._params)
            return right()

        self.step = step


def _keeps_one_duplicate(params: list[nn.Parameter]) -> None:
    for param in params:
        assert param.grad is not None
        ids = param.grad._indices()[0]
        last = [i for i, row in enumerate(ids.tolist()) if row not in ids[i + 1 :].tolist()]
        values = param.grad._values()[last]
        param.grad = torch.sparse_coo_tensor(ids[last][None], values, param.shape)


def _forgets_a_table(params: list[nn.Parameter]) -> None:
    params[-1].grad = None


def _writes_a_row_of_nobody(params: list[nn.Parameter]) -> None:
    grad = params[0].grad
    assert grad is not None
    (untouched, *_) = sorted({*range(len(params[0]))} - {*grad._indices()[0].tolist()})
    params[0][untouched] += 1e-5


def _makes_nan(params: list[nn.Parameter]) -> None:
    params[-1][-1, -1] = math.nan


FAULTS = (_keeps_one_duplicate, _forgets_a_table, _writes_a_row_of_nobody, _makes_nan)


@pytest.mark.parametrize("spoil", FAULTS)
def test_the_check_fails_what_is_wrong(spoil: Callable[[list[nn.Parameter]], None]) -> None:
    work = Embeddings(TINY, DEVICE)
    assert not check(work, _Faulty(work, spoil), reference(ADAGRAD)) <= tolerance()


def test_the_check_fails_a_wrong_rate_and_a_wrong_rule() -> None:
    work = Embeddings(TINY, DEVICE)
    slow, fast = torchs(SGD, lr=0.009_99), torchs(ADAGRAD, lr=0.1001)
    for rule, make in ((SGD, slow), (ADAGRAD, fast), (ROWWISE, torchs(ADAGRAD))):
        assert check(work, Stepped(work, make), reference(rule)) > 2 * tolerance()


def test_the_check_fails_averages_that_rest_with_their_rows() -> None:
    """What is lazy must make up for the steps in which a row had no gradient."""

    class Resting(torch.optim.Adagrad):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for param in self.param_groups[0]["params"]:
                grad, square_avg = param.grad.coalesce(), self.state[param]["sum"]
                rows, values = grad.indices()[0], grad.values()
                square_avg[rows] = 0.99 * square_avg[rows] + 0.01 * values**2
                param[rows] -= 0.01 * values / (square_avg[rows].sqrt() + 1e-8)

    work = Embeddings(Shape(5000, 3, 300, "uniform"), DEVICE)
    assert check(work, Stepped(work, Resting), reference(LAZY_RMSPROP)) > 2 * tolerance()
