"""Runs of the benchmark of sparse gradients, with the fake device.py for the GPU.

No time is asserted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_step
import pytest
import torch
from cases import DEVICE
from fake_device import FakeDevice
from lab import rows, suites
from lab.embedding_steps import FBGEMM, Candidate, Stepped
from lab.embedding_tables import DISTRIBUTIONS, Tables
from lab.embeddings import CHECKED, Embeddings
from lab.implementations import Implementation
from lab.report import judged
from lab.rows import COPY, OURS, TORCH_SPARSE, Row
from lab.rules import ADAGRAD, EMBEDDING_RULES, SGD, STORAGES, Rule
from torch import nn
from torch.optim import Optimizer

TINY = Tables(50, 8, 40, "zipf", tables=2)
Make = Callable[[list[nn.Parameter]], Optimizer]


def _work(shape: Tables = TINY, rule: Rule = ADAGRAD) -> Embeddings:
    return Embeddings(shape, rule, STORAGES[0], DEVICE)


def _torch(rule: Rule, **changes: Any) -> Make:
    make = getattr(torch.optim, rule.optimizer)
    return lambda params: make(params, **{**rule.kwargs, **changes}, foreach=False)


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


Run = Callable[..., list[Row]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run with a stand-in for the GPU."""

    def run(
        *options: str,
        shapes: Sequence[Tables] = (TINY._replace(tables=1),),
        added: tuple[Implementation, ...] = (),
    ) -> list[Row]:
        made = (*Embeddings.implementations, *added)
        with monkeypatch.context() as patched:
            patched.setattr(Embeddings, "implementations", made)
            patched.setitem(suites.SUITES, "embeddings", lambda: shapes)
            given = ("--suite", "embeddings", "--repeats", "3", "--minutes", "9")
            args = bench_step.arguments([*given, *options])
            return bench_step.run(FakeDevice(), args, tmp_path).rows

    return run


def _added(name: str, make: Make, tables: int = 0, passing: int = 0) -> Implementation:
    def build(rule: Rule, work: Embeddings) -> Candidate:
        return Stepped(work, make)

    return Implementation(
        name, "torch", build, lambda *_: None, torch_state=False, tables=tables, passing=passing
    )


def test_a_whole_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(shapes=[TINY])
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


def test_what_is_wrong_has_no_time(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    no_room = torch.OutOfMemoryError("CUDA out of memory")
    added = (
        _added("too fast", _torch(ADAGRAD, lr=0.1001)),
        _added("too large", _raises(no_room)),
        _added("huge", _torch(ADAGRAD), passing=1000),
        _added("broken", _raises(RuntimeError("broken\nin detail"))),
    )
    measured = run("--rules", "adagrad", added=added)
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


def test_ours_has_no_time_while_it_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embeddings, "check", lambda *_: (math.nan, 1.0))
    found = run()
    assert {row.status for row in found} == {rows.WRONG, rows.NOT_AVAILABLE}
    assert not any(row.gpu_us or row.wall_us for row in found)
    assert not [*judged(found)]


def test_no_room_while_all_are_timed(run: Run) -> None:
    late = _raises(torch.OutOfMemoryError("CUDA out of memory"), len(CHECKED) + 1)
    found = run("--rules", "sgd", added=(_added("late", late),))
    statuses = {row.implementation: row.status for row in found}
    assert statuses.pop("late") == rows.NO_ROOM
    assert {rows.OK} <= set(statuses.values()) <= {rows.OK, rows.NOT_AVAILABLE}


def test_what_is_there_keeps_room_for_its_step(run: Run) -> None:
    """Of 1 MiB, the fake device has room for 300 tables of 1,600 bytes, or a step of 400."""
    large = _added("large", _torch(ADAGRAD), tables=300)
    for name, statuses in (("large step", [rows.OK, rows.NO_ROOM]), ("none", [rows.OK] * 2)):
        first = _added(name, _torch(ADAGRAD), passing=400 if name == "large step" else 0)
        found = run("--rules", "adagrad", added=(first, large))
        assert [row.status for row in found if row.implementation in (name, "large")] == statuses


def test_tables_that_do_not_fit_are_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    huge = [Tables(10**9, 8, 40, distribution) for distribution in DISTRIBUTIONS]
    found = run(shapes=huge)
    assert {row.status for row in found} == {rows.NO_ROOM, rows.NOT_AVAILABLE}
    line = "1 x 1,000,000,000 x 8, 40 ids uniform: sgd, float32, triton_optim"
    assert line in capsys.readouterr().out


def test_small_steps_find_the_l2_emptied_and_have_no_share(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDevice, "may_cache", lambda *_: True)
    found = run("--rules", "sgd")
    ours, copy = (next(r for r in found if r.implementation == n) for n in (OURS, COPY))
    assert (ours.l2, ours.percent_of_copy) == ("emptied", None)
    assert copy.l2 == "exceeded" and copy.percent_of_copy == pytest.approx(100)
