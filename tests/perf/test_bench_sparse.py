"""The benchmark of sparse gradients without its GPU: what is timed, judged and printed.

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
from lab import rows, sparse_group, sparse_host
from lab.implementations import COPY, OURS
from lab.sparse_implementations import (
    ADAGRAD,
    FBGEMM,
    IMPLEMENTATIONS,
    RULES,
    SGD,
    TORCH_SPARSE,
    Implementation,
    Rule,
    Stepped,
)
from lab.sparse_rows import COLUMNS, Row, append, judged
from lab.sparse_work import CHECKED, Embeddings
from sparse_benchmark import TINY, Make, torchs
from torch import nn
from torch.optim import Optimizer

ROOT = Path(__file__).parents[2]


def _stepped(make: Make) -> Callable[[Embeddings], Stepped]:
    return lambda work: Stepped(work, make)


def _raises(error: Exception, good_steps: int = 0) -> Make:
    def make(params: list[nn.Parameter]) -> Optimizer:
        steps = iter(range(good_steps))

        def before(*_: object) -> None:
            if next(steps, None) is None:
                raise error

        optimizer = torchs(SGD)(params)
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
        _added("too fast", torchs(ADAGRAD, lr=0.1001)),
        _added("too large", _raises(no_room)),
        _added("huge", torchs(ADAGRAD), passing=1000),
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
    large = _added("large", torchs(ADAGRAD), tables=300)
    for name, statuses in (("large step", [rows.OK, rows.NO_ROOM]), ("none", [rows.OK] * 2)):
        first = _added(name, torchs(ADAGRAD), passing=400 if name == "large step" else 0)
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
