"""The benchmark of sparse gradients without its GPU: what is made, checked, timed and judged.

No time is asserted. What stands in for the GPU is fake_device.py.
"""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_sparse
import pytest
import torch
from cases import DEVICE
from fake_device import FakeDevice
from lab import rows, sparse_group, sparse_host, sparse_work
from lab.implementations import COPY, OURS
from lab.sparse_implementations import (
    ADAGRAD,
    FBGEMM,
    IMPLEMENTATIONS,
    LAZY_RMSPROP,
    ROWWISE,
    RULES,
    SGD,
    TORCH_SPARSE,
    Implementation,
    Rule,
    Stepped,
    reference,
)
from lab.sparse_rows import COLUMNS, Row, append, judged
from lab.sparse_work import CHECKED, Embeddings, Shape, check, tolerance
from torch import Tensor, nn
from torch.optim import Optimizer

ROOT = Path(__file__).parents[2]
TINY = Shape(50, 8, 40, "zipf", tables=2)
INSTALLED = [item for item in IMPLEMENTATIONS if item.version() is not None]

Make = Callable[[list[nn.Parameter]], Optimizer]


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

    check(work, Seeing(work, _torch(SGD)), reference(SGD))
    (ids, values), *others = seen
    assert [torch.equal(ids, other) for other, _ in others] == [False, True]
    assert not any(torch.equal(values, other) for _, other in others)


def _torch(rule: Rule, **changes: Any) -> Make:
    make = getattr(torch.optim, rule.optimizer)
    return lambda params: make(params, **{**rule.kwargs, **changes}, foreach=False)


def _stepped(make: Make) -> Callable[[Embeddings], Stepped]:
    return lambda work: Stepped(work, make)


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
    work = Embeddings(TINY, DEVICE)
    assert not check(work, _Faulty(work, spoil), reference(ADAGRAD)) <= tolerance()


def test_the_check_fails_a_wrong_rate_and_a_wrong_rule() -> None:
    work = Embeddings(TINY, DEVICE)
    slow, fast = _torch(SGD, lr=0.009_99), _torch(ADAGRAD, lr=0.1001)
    for rule, make in ((SGD, slow), (ADAGRAD, fast), (ROWWISE, _torch(ADAGRAD))):
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
    monkeypatch: pytest.MonkeyPatch, *options: str, added: tuple[Implementation, ...] = ()
) -> list[Row]:
    """A run with a stand-in for the GPU."""
    monkeypatch.setattr(sparse_group, "IMPLEMENTATIONS", (*IMPLEMENTATIONS, *added))
    sizes = ("--rows", "50", "--dim", "8", "--batch", "40", "--distributions", "zipf")
    args = bench_sparse.arguments([*sizes, "--repeats", "3", "--minutes", "9", *options])
    return bench_sparse.run(FakeDevice(), args)


def _added(
    name: str, make: Make, rule: Rule = ADAGRAD, tables: int = 0, passing: int = 0
) -> Implementation:
    return Implementation(rule, name, _stepped(make), tables, passing)


def test_a_whole_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "sparse.csv"
    found = _run(monkeypatch, "--tables", "2", "--out", str(out))
    _run(monkeypatch, "--rules", "sgd", "--out", str(out))
    by_key = {(row.rule, row.implementation): row for row in found}
    ours = [by_key[rule.name, OURS] for rule in RULES]
    assert {row.status for row in ours} == {rows.OK}
    copy = by_key["", COPY]
    work = Embeddings(TINY, DEVICE)
    for row in found:
        if row.status != rows.OK:
            assert row.implementation == FBGEMM and "not installed" in row.detail
            continue
        assert row.repeats == 3
        for clock in ("gpu_us", "wall_us", "host_us"):
            low, median, high = (getattr(row, clock + end) for end in ("_p20", "", "_p80"))
            assert 0 < low <= median <= high
        assert row.unique_rows == work.counted()[0]
        is_ours = row.implementation in (OURS, COPY)
        assert (row.gb_per_s is not None) == is_ours
        assert row.copy_gb_per_s == (copy.gb_per_s if is_ours else None)
    for rule, row in zip(RULES, ours, strict=True):
        assert row.step_bytes == rule.step_bytes(TINY, row.unique_rows or 0)
        assert row.gb_per_s == pytest.approx((row.step_bytes or 0) / (row.gpu_us or 0) / 1e3)
        assert row.l2 == "exceeded"  # the fake device's are 1,024 bytes
        share = 100 * (row.gb_per_s or 0) / (row.copy_gb_per_s or 0)
        assert row.percent_of_copy == pytest.approx(share)
    printed = capsys.readouterr().out
    assert "2 tables of 50 x 8, 40 ids zipf" in printed
    assert "torch's sparse Adagrad, GPU time" in printed  # a goal
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [*lines[0]] == COLUMNS
    first = [{k: "" if v is None else str(v) for k, v in asdict(row).items()} for row in found]
    assert lines[: len(found)] == first
    assert {line["rule"] for line in lines[len(found) :]} == {"", "sgd"}
    out.write_text("gpu,time\nx,1\n")
    with pytest.raises(ValueError, match="other columns"):
        append(out, found)


def test_what_is_wrong_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_room = torch.OutOfMemoryError("CUDA out of memory")
    added = (
        _added("too fast", _torch(ADAGRAD, lr=0.1001)),
        _added("too large", _raises(no_room)),
        _added("huge", _torch(ADAGRAD), passing=1000),
        _added("broken", _raises(RuntimeError("broken\nin detail"))),
    )
    found = {
        row.implementation: row for row in _run(monkeypatch, "--rules", "adagrad", added=added)
    }
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
    assert "adagrad, too fast                   wrong (error " in printed
    assert "did not fit the memory:\n  1 x 50 x 8, 40 ids zipf: adagrad, too large" in printed


def test_ours_has_no_time_while_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_group, "check", lambda *_: math.nan)
    found = _run(monkeypatch)
    assert {row.status for row in found} <= {rows.WRONG, rows.NOT_AVAILABLE}
    assert not any(row.gpu_us or row.wall_us for row in found)
    assert judged(found) == []


def test_no_room_while_all_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = SGD._replace(name="adagrad")
    late = _raises(torch.OutOfMemoryError("CUDA out of memory"), len(CHECKED))
    found = _run(monkeypatch, "--rules", "adagrad", added=(_added("late", late, sgd),))
    statuses = {row.implementation: row.status for row in found}
    assert statuses.pop("late") == rows.NO_ROOM
    assert {rows.OK} <= set(statuses.values()) <= {rows.OK, rows.NOT_AVAILABLE}


def test_what_is_there_keeps_room_for_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 MiB of memory, 300 tables of 1,600 bytes fit, or a step that takes 400."""
    large = _added("large", _torch(ADAGRAD), tables=300)
    for name, statuses in (("large step", [rows.OK, rows.NO_ROOM]), ("none", [rows.OK] * 2)):
        first = _added(name, _torch(ADAGRAD), passing=400 if name == "large step" else 0)
        found = _run(monkeypatch, "--rules", "adagrad", added=(first, large))
        assert [row.status for row in found if row.implementation in (name, "large")] == statuses


def test_tables_that_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(monkeypatch, "--rows", "1000000000", "--distributions", "zipf", "uniform")
    assert {row.status for row in found} <= {rows.NO_ROOM, rows.NOT_AVAILABLE}
    assert "1 x 1,000,000,000 x 8, 40 ids uniform: sgd, triton_optim" in capsys.readouterr().out


def test_a_run_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--rows", "50", "60", "--minutes", "0") == []
    left = "the time was up before 2 shapes, the first of them 1 table of 50 x 8, 40 ids zipf"
    assert left in capsys.readouterr().out


def test_small_steps_find_the_l2_emptied_and_have_no_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeDevice, "may_cache", lambda *_: True)
    found = _run(monkeypatch, "--rules", "sgd")
    ours, copy = (next(r for r in found if r.implementation == n) for n in (OURS, COPY))
    assert (ours.l2, ours.percent_of_copy) == ("emptied", None)
    assert copy.l2 == "exceeded" and copy.percent_of_copy == pytest.approx(100)


def _made_up(rule: str, name: str, us: float, **columns: Any) -> Row:
    """A made-up row; no machine gave it."""
    row = Row(rule=rule, implementation=name, status=rows.OK, gpu_us=us, wall_us=us + 50)
    for column, value in {"rows": 1000, "unique_rows": 100_000, **columns}.items():
        setattr(row, column, value)
    return row


def test_goals_are_judged_by_the_worst_row() -> None:
    found = [
        _made_up("adagrad", OURS, 100, percent_of_copy=80.0),
        _made_up("adagrad", TORCH_SPARSE, 1000),
        _made_up("rowwise-adagrad", OURS, 50, percent_of_copy=95.0),
        _made_up("adagrad", OURS, 10, percent_of_copy=30.0, rows=10, unique_rows=99_999),
        _made_up("adagrad", TORCH_SPARSE, 950, rows=10),
        _made_up("sgd", TORCH_SPARSE, 1),
        _made_up("", COPY, 1, percent_of_copy=1.0),
        _made_up("adagrad", OURS, 9, status=rows.WRONG, percent_of_copy=1.0),
    ]
    goals = judged(found)
    assert [(goal.met, goal.reached.split(" (")[0]) for goal in goals] == [
        (True, "10.00x"),
        (False, "7.00x"),
        (True, "20.00x"),
        (True, "10.50x"),
        (True, "80.0 %"),
    ]
    on_cpu = [_made_up("adagrad", name, 1.0, gpu_us=None) for name in (OURS, TORCH_SPARSE)]
    assert judged(on_cpu) == []


def test_a_cpu_times_all_but_ours() -> None:
    host = sparse_host.Host(sparse_host.GIB << 10)
    for only_check in (False, True):
        group = sparse_group.Group(host, TINY._replace(tables=1), ("adagrad",), only_check)
        found = {row.implementation: row for row in group.bench(Row(), 2, 0.0)}
        assert COPY not in found
        assert found[OURS].wall_us is found[TORCH_SPARSE].gpu_us is None
        assert (found[TORCH_SPARSE].wall_us is None) == only_check
        assert (found[OURS].error is None) != only_check
    assert sparse_host.Host(1000).free_bytes() < 0


def _printed(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "perf/bench_sparse.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    sizes = ("--rows", "100", "--dim", "4", "--batch", "50", "--repeats", "2")
    printed = _printed(*sizes, "--out", str(tmp_path / "sparse.csv"))
    assert "goals" not in printed and "GPU: none" in printed
    with (tmp_path / "sparse.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    ours = [line for line in lines if line["implementation"] == OURS]
    on_cpu = [line for line in ours if line["gpu"] == "none"]
    assert len(on_cpu) == 2 * len(RULES) and {line["status"] for line in on_cpu} == {"n/a"}
    assert not any(line["wall_us"] or line["gpu_us"] for line in ours)
    dry = [line for line in ours if line["gpu"] != "none"]
    assert [line["tables"] for line in dry] == ["1"] * len(RULES) + ["26"] * len(RULES)
    assert {line["status"] for line in dry} == {"ok"}, [line["detail"] for line in dry]
    assert all(line["host_us"] for line in dry)
    assert any(line["wall_us"] for line in lines if line["implementation"] == TORCH_SPARSE)


def test_only_checking() -> None:
    printed = _printed("--check", "--rows", "100", "--dim", "4", "--batch", "50")
    assert " us " not in printed
    for rule in RULES:
        assert len(re.findall(rf"  {rule.name}, {OURS} +right \(error ", printed)) == 2


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--repeats", "1"], ["--rules", "adam"]):
        with pytest.raises(SystemExit):
            bench_sparse.arguments(arguments)
    printed = capsys.readouterr().err
    assert "two at least" in printed and "'adam'" in printed
