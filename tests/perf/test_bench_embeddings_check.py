"""The check of steps of embeddings: what is right passes it, and what is wrong does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE
from lab import embeddings
from lab.embedding_steps import Candidate, Stepped
from lab.embedding_tables import Tables
from lab.embeddings import CHECKED, Embeddings, tolerance
from lab.implementations import Implementation
from lab.rules import ADAGRAD, EMBEDDING_RULES, LAZY_RMSPROP, ROWWISE, SGD, STORAGES, Rule
from torch import Tensor, nn
from torch.optim import Optimizer

TINY = Tables(50, 8, 40, "zipf", tables=2)


# Every step that there is here, with a rule that it can.
STEPS = [
    (rule, item)
    for rule in EMBEDDING_RULES
    for item in Embeddings.implementations
    if item.why_not(rule, STORAGES[0], 1) is None
]


Make = Callable[[list[nn.Parameter]], Optimizer]


def _work(shape: Tables = TINY, rule: Rule = ADAGRAD) -> Embeddings:
    return Embeddings(shape, rule, STORAGES[0], DEVICE)


def _torch(rule: Rule, **changes: Any) -> Make:
    make = getattr(torch.optim, rule.optimizer)
    return lambda params: make(params, **{**rule.kwargs, **changes}, foreach=False)


def _error(work: Embeddings, candidate: Candidate) -> float:
    return work.check(candidate, lambda: None)[0]


@pytest.mark.parametrize(("rule", "item"), STEPS, ids=lambda value: value.name if value else None)
@pytest.mark.parametrize("shape", [TINY, Tables(5000, 12, 300, "uniform")], ids=lambda s: s.name)
def test_the_check_passes_what_is_right(rule: Rule, item: Implementation, shape: Tables) -> None:
    work = _work(shape, rule)
    assert 0 < _error(work, work.build(item)) <= work.tolerance(item)


def test_duplicates_that_are_added_one_by_one_round_as_often() -> None:
    work = _work(Tables(3, 4, 200_000, "uniform"), SGD)
    most = work.counted()[1]
    (item,) = (i for i in work.implementations if i.one_by_one)
    error = _error(work, work.build(item))
    assert work.tolerance(item) == tolerance(most)
    # Where torch sums them first, as it may on a GPU, the error is smaller.
    assert (tolerance() < error or DEVICE == "cuda") and error <= tolerance(most)


def test_the_check_gives_every_step_new_gradients() -> None:
    work = _work(rule=SGD)
    seen: list[tuple[Tensor, Tensor]] = []

    class Seeing(Stepped):
        def load(self, batch: int) -> None:
            super().load(batch)
            grad = self._work.grads[batch][0]
            seen.append((grad._indices().clone(), grad._values().clone()))

    _error(work, Seeing(work, _torch(SGD)))
    (ids, values), *others = seen
    assert [torch.equal(ids, other) for other, _ in others] == [False, True]
    assert not any(torch.equal(values, other) for _, other in others)


class _Faulty(Stepped):
    """torch's sparse Adagrad, which does something to gradients or tables before it steps."""

    def __init__(self, work: Embeddings, spoil: Callable[[list[nn.Parameter]], None]) -> None:
        super().__init__(work, _torch(ADAGRAD))
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
    work = _work()
    assert not _error(work, _Faulty(work, spoil)) <= tolerance()


def test_the_check_fails_a_wrong_rate_and_a_wrong_rule() -> None:
    slow, fast = _torch(SGD, lr=0.0999), _torch(ADAGRAD, lr=0.1001)
    for rule, make in ((SGD, slow), (ADAGRAD, fast), (ROWWISE, _torch(ADAGRAD))):
        work = _work(rule=rule)
        assert _error(work, Stepped(work, make)) > 2 * tolerance()


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

    work = _work(Tables(5000, 3, 300, "uniform"), LAZY_RMSPROP)
    assert _error(work, Stepped(work, Resting)) > 2 * tolerance()


def test_checked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    work = _work(Tables(10_000, 1, 5000, "zipf", tables=2))
    assert [len(probes) for probes in _work().probes()] == [50, 50]
    monkeypatch.setattr(embeddings, "PROBED", 64)
    for table, probes in enumerate(work.probes()):
        touched = torch.cat([work.ids[batch][table] for batch in sorted({*CHECKED})])
        frequent = touched.bincount().topk(embeddings.FREQUENT).indices
        assert probes.tolist() == sorted(set(probes.tolist()))
        assert {0, 9999, *frequent.tolist()} <= {*probes.tolist()}
        n_touched = int(torch.isin(probes, touched).sum())
        assert n_touched >= 32 and len(probes) - n_touched >= 16
        assert len(probes) <= 64 + 2 + embeddings.FREQUENT
