"""The benchmark of sparse gradients: what is made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DEVICE
from lab import embeddings
from lab.embedding_tables import BATCHES, DISTRIBUTIONS, Tables
from lab.embeddings import Embeddings
from lab.rules import ADAGRAD, EMBEDDING_RULES, LAZY_RMSPROP, ROWWISE, SGD, STORAGES, Rule
from torch import Tensor, nn

TINY = Tables(50, 8, 40, "zipf", tables=2)


def _work(shape: Tables = TINY, rule: Rule = ADAGRAD) -> Embeddings:
    return Embeddings(shape, rule, STORAGES[0], DEVICE)


def _drawn(shape: Tables) -> Tensor:
    return embeddings.ids_of(shape, DEVICE, torch.Generator(DEVICE).manual_seed(0))()


def test_zipf_is_zipf() -> None:
    n, n_ids = 1000, 200_000
    ids = _drawn(Tables(n, 1, n_ids, "zipf"))
    counts = ids.bincount(minlength=n)
    assert len(counts) == n
    shares = [rank**-embeddings.ZIPF_EXPONENT for rank in range(1, n + 1)]
    frequent = counts.sort(descending=True)
    for share, count in zip(shares[:20], frequent.values.tolist(), strict=False):
        expected = n_ids * share / sum(shares)
        assert abs(count - expected) < 5 * math.sqrt(expected)
    hot = frequent.indices[:20].sort().values
    assert hot.diff().min() > 1  # no two of them side by side


@pytest.mark.parametrize("n", [1, 2, 97, 100])
def test_every_row_is_drawn(n: int) -> None:
    for distribution in DISTRIBUTIONS:
        ids = _drawn(Tables(n, 1, 40_000, distribution))
        assert ids.dtype == torch.int64
        assert ids.unique().tolist() == [*range(n)]


def test_uniform_is_uniform() -> None:
    counts = _drawn(Tables(100, 1, 100_000, "uniform")).bincount(minlength=100)
    assert ((counts - 1000).abs() < 6 * math.sqrt(1000)).all()


def test_gradients_are_those_of_an_embedding() -> None:
    work = _work()
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
    shape = Tables(3, 4, 5000, "uniform")
    work = _work(shape)
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
    shape = Tables(10, 4, 3, "uniform", tables=2)
    work = _work(shape)
    one, two = (torch.tensor(ids, device=DEVICE) for ids in ([7, 1, 7], [0, 0, 0]))
    work.ids = [[one, two]] * BATCHES
    assert work.counted() == (3, 3)
    # Read: 2 gradients of 3 rows of 4 numbers; and of 3 rows, twice: 4 of the parameter, and state.
    found = [shape.step_bytes(rule, 3) for rule in (SGD, ADAGRAD, ROWWISE, LAZY_RMSPROP)]
    assert found == [4 * (24 + 6 * numbers) for numbers in (4, 4 + 4, 4 + 1, 4 + 4 + 1)]
    assert (shape.table_bytes, shape.value_bytes) == (2 * 160, 2 * 48)


@pytest.mark.parametrize("rule", EMBEDDING_RULES, ids=lambda rule: rule.name)
def test_our_state_is_what_is_counted(rule: Rule) -> None:
    work = _work(rule=rule)
    ours = work.implementations[0]
    candidate: Any = work.build(ours)
    candidate()
    states = candidate.step.__self__.state.values()
    kept = sum(value.nbytes for state in states for value in state.values() if value.dim())
    assert kept == TINY.state_bytes(rule, STORAGES[0]) == work.needed(ours)[0]
