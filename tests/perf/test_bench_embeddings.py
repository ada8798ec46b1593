"""The benchmark of sparse gradients without its GPU: what is made, checked, timed and judged.

No time is asserted. What stands in for the GPU is the fake device.py.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_step
import pytest
import torch
from cases import DEVICE
from fake_device import FakeDevice
from lab import dry_embeddings, embeddings, rows, suites
from lab.bench import bench
from lab.device import Host
from lab.embedding_steps import FBGEMM, Candidate, Stepped
from lab.embedding_tables import BATCHES, DISTRIBUTIONS, Tables
from lab.embeddings import CHECKED, Embeddings, tolerance
from lab.goals import judged
from lab.group import Group
from lab.implementations import Implementation
from lab.rows import COPY, OURS, TORCH_SPARSE, Row
from lab.rules import ADAGRAD, EMBEDDING_RULES, LAZY_RMSPROP, ROWWISE, SGD, STORAGES, Rule
from torch import Tensor, nn
from torch.optim import Optimizer

ROOT = Path(__file__).parents[2]
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


def _error(work: Embeddings, candidate: Candidate) -> float:
    return work.check(candidate, lambda: None)[0]


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


def _torch(rule: Rule, **changes: Any) -> Make:
    make = getattr(torch.optim, rule.optimizer)
    return lambda params: make(params, **{**rule.kwargs, **changes}, foreach=False)


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


def _raises(error: Exception, good_steps: int = 0) -> Make:
    def make(params: list[nn.Parameter]) -> Optimizer:
        steps = iter(range(good_steps))

        def before(*_: object) -> None:
            if next(steps, None) is None:
                raise error

        optimizer = _torch(SGD)(params)
        optimizer.register_step_pre_hook(before)
        return optimizer

    return make


def _run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *options: str,
    shapes: Sequence[Tables] = (TINY._replace(tables=1),),
    added: tuple[Implementation, ...] = (),
) -> list[Row]:
    """A run with a stand-in for the GPU."""
    made = (*Embeddings.implementations, *added)
    with monkeypatch.context() as patched:
        patched.setattr(Embeddings, "implementations", made)
        patched.setitem(suites.SUITES, "embeddings", lambda: shapes)
        given = ("--suite", "embeddings", "--repeats", "3", "--minutes", "9")
        args = bench_step.arguments([*given, *options])
        return bench_step.run(FakeDevice(), args, folder).rows


def _added(name: str, make: Make, tables: int = 0, passing: int = 0) -> Implementation:
    def build(rule: Rule, work: Embeddings) -> Candidate:
        return Stepped(work, make)

    return Implementation(
        name, "torch", build, lambda *_: None, torch_state=False, tables=tables, passing=passing
    )


def test_a_whole_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(monkeypatch, tmp_path, shapes=[TINY])
    for rule in EMBEDDING_RULES:
        rows_of = {row.implementation: row for row in found if row.rule == rule.name}
        ours, copy = rows_of[OURS], rows_of[COPY]
        assert ours.status == copy.status == rows.OK
        assert ours.step_bytes == TINY.step_bytes(rule, ours.unique_rows or 0)
        assert ours.gb_per_s == pytest.approx((ours.step_bytes or 0) / (ours.gpu_us or 0) / 1e3)
        assert ours.l2 == "exceeded"  # the fake device's are 1,024 bytes
        share = 100 * (ours.gb_per_s or 0) / (ours.copy_gb_per_s or 0)
        assert ours.percent_of_copy == pytest.approx(share)
        assert ours.percent_of_mixed_copy is None
        assert ours.launches == 1
    work = _work()
    for row in found:
        if row.status != rows.OK:
            assert row.status == rows.NOT_AVAILABLE and row.detail
            assert row.implementation != FBGEMM or "no" in row.detail
            continue
        assert row.repeats == 3
        for clock in ("gpu_us", "wall_us", "host_us"):
            low, median, high = (getattr(row, clock + end) for end in ("_p20", "", "_p80"))
            assert 0 < low <= median <= high
        assert row.unique_rows == work.counted()[0]
        assert row.copy_gb_per_s
    printed = capsys.readouterr().out
    assert "2 x 50 x 8, 40 ids zipf: 2 tensors, 800 parameters; " in printed
    assert "torch's sparse Adagrad by adagrad, GPU time" in printed  # a goal
    (path,) = tmp_path.iterdir()
    assert rows.read(path) == found


def test_what_is_wrong_has_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_room = torch.OutOfMemoryError("CUDA out of memory")
    added = (
        _added("too fast", _torch(ADAGRAD, lr=0.1001)),
        _added("too large", _raises(no_room)),
        _added("huge", _torch(ADAGRAD), passing=1000),
        _added("broken", _raises(RuntimeError("broken\nin detail"))),
    )
    measured = _run(monkeypatch, tmp_path, "--rules", "adagrad", added=added)
    found = {row.implementation: row for row in measured}
    wrong = found["too fast"]
    assert (wrong.error or 0) > (wrong.tolerance or 1)
    statuses = {item.name: found[item.name].status for item in added}
    assert [*statuses.values()] == [rows.WRONG, rows.NO_ROOM, rows.NO_ROOM, rows.FAILED]
    for item in added:
        row = found[item.name]
        assert row.repeats is row.gpu_us is row.wall_us is row.host_us is row.gb_per_s is None
    assert found["broken"].detail == "RuntimeError: broken"
    assert found[OURS].status == found[TORCH_SPARSE].status == rows.OK
    printed = capsys.readouterr().out
    assert "too fast        wrong (error " in printed
    line = "1 x 50 x 8, 40 ids zipf: adagrad, float32, too large"
    assert f"did not fit the memory:\n  {line}\n" in printed


def test_ours_has_no_time_while_it_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Embeddings, "check", lambda *_: (math.nan, 1.0))
    found = _run(monkeypatch, tmp_path)
    assert {row.status for row in found} == {rows.WRONG, rows.NOT_AVAILABLE}
    assert not any(row.gpu_us or row.wall_us for row in found)
    assert not [*judged(found)]


def test_no_room_while_all_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    late = _raises(torch.OutOfMemoryError("CUDA out of memory"), len(CHECKED) + 1)
    found = _run(monkeypatch, tmp_path, "--rules", "sgd", added=(_added("late", late),))
    statuses = {row.implementation: row.status for row in found}
    assert statuses.pop("late") == rows.NO_ROOM
    assert {rows.OK} <= set(statuses.values()) <= {rows.OK, rows.NOT_AVAILABLE}


def test_what_is_there_keeps_room_for_its_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 1 MiB, the fake device has room for 300 tables of 1,600 bytes, or a step of 400."""
    large = _added("large", _torch(ADAGRAD), tables=300)
    for name, statuses in (("large step", [rows.OK, rows.NO_ROOM]), ("none", [rows.OK] * 2)):
        first = _added(name, _torch(ADAGRAD), passing=400 if name == "large step" else 0)
        found = _run(monkeypatch, tmp_path, "--rules", "adagrad", added=(first, large))
        assert [row.status for row in found if row.implementation in (name, "large")] == statuses


def test_tables_that_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = [Tables(10**9, 8, 40, distribution) for distribution in DISTRIBUTIONS]
    found = _run(monkeypatch, tmp_path, shapes=huge)
    assert {row.status for row in found} == {rows.NO_ROOM, rows.NOT_AVAILABLE}
    line = "1 x 1,000,000,000 x 8, 40 ids uniform: sgd, float32, triton_optim"
    assert line in capsys.readouterr().out


def test_small_steps_find_the_l2_emptied_and_have_no_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FakeDevice, "may_cache", lambda *_: True)
    found = _run(monkeypatch, tmp_path, "--rules", "sgd")
    ours, copy = (next(r for r in found if r.implementation == n) for n in (OURS, COPY))
    assert (ours.l2, ours.percent_of_copy) == ("emptied", None)
    assert copy.l2 == "exceeded" and copy.percent_of_copy == pytest.approx(100)


def _made_up(rule: str, name: str, us: float, **columns: Any) -> Row:
    """A made-up row; no machine gave it."""
    row = Row(rule=rule, implementation=name, status=rows.OK, gpu_us=us, wall_us=us + 50)
    vars(row).update({"layout": "large", "batch": 1, "unique_rows": 100_000, **columns})
    return row


def test_goals_are_judged_by_the_worst_row() -> None:
    found = [
        _made_up("adagrad", OURS, 100, percent_of_copy=80.0),
        _made_up("adagrad", TORCH_SPARSE, 1000),
        _made_up("rowwise-adagrad", OURS, 50, percent_of_copy=95.0),
        _made_up("adagrad", OURS, 10, percent_of_copy=30.0, layout="small", unique_rows=99_999),
        _made_up("adagrad", TORCH_SPARSE, 950, layout="small"),
        _made_up("sgd", TORCH_SPARSE, 1, percent_of_copy=1.0),
        _made_up("adagrad", COPY, 1, percent_of_copy=1.0),
        _made_up("adagrad", OURS, 9, layout="wrong", status=rows.WRONG, percent_of_copy=1.0),
    ]
    goals = [*judged(found)]
    assert [(goal.met, goal.reached.split(" (")[0]) for goal in goals] == [
        (True, "10.00x"),
        (False, "7.00x"),
        (True, "20.00x"),
        (True, "10.50x"),
        (True, "80.0 %"),
    ]
    on_cpu = [_made_up("adagrad", name, 1.0, gpu_us=None) for name in (OURS, TORCH_SPARSE)]
    assert not [*judged(on_cpu)]


def test_a_cpu_times_all_but_ours() -> None:
    host = Host(1 << 40)
    group = Group("", TINY._replace(tables=1), ADAGRAD, STORAGES[0])
    for only_check in (False, True):
        found = {row.implementation: row for row in bench(host, group, Row(), 2, 0.0, only_check)}
        assert COPY not in found
        assert found[OURS].wall_us is found[TORCH_SPARSE].gpu_us is None
        assert (found[TORCH_SPARSE].wall_us is None) == only_check
        assert (found[OURS].error is None) != only_check
        assert found[TORCH_SPARSE].status == (rows.RIGHT if only_check else rows.OK)
    assert Host(1000).free_bytes() < 0


def _printed(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "perf/bench_step.py", "--suite", "embeddings-tiny", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    printed = _printed("--repeats", "2", "--out", str(tmp_path))
    assert "goals" not in printed and "GPU: none" in printed
    (path,) = tmp_path.iterdir()
    measured = rows.read(path)
    ours = [row for row in measured if row.implementation == OURS]
    on_cpu = [row for row in ours if row.gpu == "none"]
    n_shapes = len(suites.SUITES["embeddings-tiny"]())
    assert len(on_cpu) == n_shapes * len(EMBEDDING_RULES)
    assert {row.status for row in on_cpu} == {rows.NOT_AVAILABLE}
    assert not any(row.wall_us or row.gpu_us for row in ours)
    dry = [row for row in ours if row.gpu != "none"]
    assert [row.tensors for row in dry] == [1] * len(EMBEDDING_RULES) + [26] * len(EMBEDDING_RULES)
    assert {row.status for row in dry} == {rows.OK}, [row.detail for row in dry]
    assert all(row.host_us and row.suite == dry_embeddings.SUITE for row in dry)
    assert any(row.wall_us for row in measured if row.implementation == TORCH_SPARSE)


def test_only_checking() -> None:
    printed = _printed("--check")
    assert not re.search(r"\d+\.\d+-\d", printed) and "wrote" not in printed
    n_shapes = len(suites.SUITES["embeddings-tiny"]())
    right = re.findall(rf"  {OURS} +right \(error ", printed)
    assert len(right) == n_shapes * len(EMBEDDING_RULES)
