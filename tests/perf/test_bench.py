"""The benchmark of steps without its GPU: sampling, and a whole run.

No time is asserted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import bench_step
import pytest
import torch
from fake_device import FakeDevice
from lab import bench, rows, suites, workload
from lab.group import Group
from lab.implementations import IMPLEMENTATIONS, Implementation
from lab.rows import COPIES, MIXED_COPY, OURS
from lab.rules import RULES, STORAGES, Rule
from lab.suites import Layout
from torch.nn import Parameter
from torch.optim import Optimizer

FOR_LOOP = IMPLEMENTATIONS[1].build

FLOAT32, BFLOAT16, MIXED = STORAGES
SGD, MOMENTUM, ADAGRAD, RMSPROP, RMSPROP_CM, ADAMW = RULES
TINY = Layout("tiny", [("weight", (12, 15)), ("bias", (7,)), ("scale", (1,))])


def _raises(error: Exception, good_steps: int = 0) -> Callable[..., Optimizer]:
    def build(rule: Rule, params: list[Parameter]) -> Optimizer:
        optimizer: Optimizer = FOR_LOOP(rule, params)
        steps = iter(range(good_steps))

        def before(*_: object) -> None:
            if next(steps, None) is None:
                raise error

        optimizer.register_step_pre_hook(before)
        return optimizer

    return build


def _too_fast(rule: Rule, params: list[Parameter]) -> Optimizer:
    faster = {**rule.kwargs, "lr": 1.0001 * rule.kwargs["lr"]}
    optimizer: Optimizer = FOR_LOOP(rule._replace(kwargs=faster), params)
    return optimizer


def _added(name: str, build: Callable[..., Optimizer], compiled: bool = False) -> Implementation:
    return Implementation(name, "torch", build, lambda *_: None, compiled=compiled)


Run = tuple[list[rows.Row], str]


@pytest.fixture
def whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Small layouts and one that is too large, with some bad implementations: rows and print."""
    no_room = torch.OutOfMemoryError("CUDA out of memory")
    added = (
        _added("compiled", FOR_LOOP, compiled=True),
        _added("wrong", _too_fast),
        _added("too large", _raises(no_room)),
        _added("too large now", _raises(no_room, 3)),
        _added("too large later", _raises(no_room, 6)),
        _added("broken", _raises(RuntimeError("broken\nin detail"))),
    )
    known = [item for item in IMPLEMENTATIONS if not item.compiled]
    monkeypatch.setattr(workload.Workload, "implementations", (*known, *added))
    monkeypatch.setattr(torch, "compile", lambda **_: lambda step: step)
    others = [Layout(name, [("weight", (n,))]) for name, n in (("small", 300), ("huge", 1 << 30))]
    monkeypatch.setitem(suites.SUITES, "sweep", lambda: [TINY, *others])
    options = ["--rules", "momentum", "--storages", "float32", "--repeats", "4"]
    path = bench_step.run(FakeDevice(), bench_step.arguments(options), tmp_path).path
    assert path.parent == tmp_path
    assert path.name.startswith("step-sweep-no-gpu-2-20")
    return rows.read(path), capsys.readouterr().out


def test_a_whole_run(whole_run: Run) -> None:
    measured, printed = whole_run
    tiny = {row.implementation: row for row in measured if row.layout == "tiny"}
    timed = (OURS, "torch foreach", "compiled", *COPIES)
    assert {tiny[name].status for name in timed} == {rows.OK}
    for row in tiny.values():
        if row.status == rows.OK:
            assert row.repeats == 4
            assert row.gpu_us_p20 and row.gpu_us and row.gpu_us_p80
            assert row.gpu_us_p20 <= row.gpu_us <= row.gpu_us_p80
            assert row.host_us and row.wall_us and row.host_us <= row.wall_us
            assert row.launches == (None if row.implementation in COPIES else 1)
        else:
            assert row.gpu_us is row.wall_us is row.host_us is row.launches is None
    ours = tiny[OURS]
    assert ours.step_bytes == 20 * TINY.params == 20 * ours.params
    assert ours.gb_per_s == pytest.approx(20 * TINY.params / (ours.gpu_us or 0) / 1e3)
    assert ours.l2 == "emptied"
    assert ours.percent_of_copy is ours.percent_of_mixed_copy is ours.percent_of_peak is None
    small = {row.implementation: row for row in measured if row.layout == "small"}
    _assert_shares_of_the_copies_and_of_the_peak(small)
    assert "% copy   % mix  % peak" in printed
    assert "tiny: 3 tensors, 188 parameters; momentum, float32" in printed
    assert "goals" in printed


def _assert_shares_of_the_copies_and_of_the_peak(small: dict[str, rows.Row]) -> None:
    copy, mixed = (small[name].gb_per_s or 0.0 for name in COPIES)
    for row in (small[name] for name in (OURS, *COPIES)):
        assert row.l2 == "exceeded"
        beside = (row.copy_gb_per_s, row.mixed_copy_gb_per_s, row.peak_gb_per_s)
        assert beside == (copy, mixed, 4000.0)
        shares = (row.percent_of_copy, row.percent_of_mixed_copy, row.percent_of_peak)
        rate = row.gb_per_s or 0.0
        assert shares == pytest.approx([100 * rate / other for other in (copy, mixed, 4000.0)])
    # Of a parameter, its gradient and momentum in float32: whole blocks of 4,096.
    moved = FakeDevice().copied.nbytes
    assert small[MIXED_COPY].step_bytes == moved // 20 // 4096 * 4096 * 20


def test_without_a_known_peak_there_is_no_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload.Workload, "implementations", IMPLEMENTATIONS[:1])
    device = FakeDevice()
    device.peak_bandwidth = None
    item = Group("", Layout("small", [("weight", (400,))]), SGD, FLOAT32)
    ours = bench.bench(device, item, rows.Row(), 3, math.inf)[0]
    assert ours.percent_of_mixed_copy
    assert ours.peak_gb_per_s is ours.percent_of_peak is None


def test_peak_memory_counts_state_once() -> None:
    """What a package keeps of its own is among what was allocated since before it was built."""
    item = Group("", TINY, MOMENTUM, MIXED)
    row = rows.Row(model_bytes=80, kept_bytes=7, step_extra_bytes=1)
    shares = _added("shares", FOR_LOOP)
    assert bench._peak_bytes(item, shares, row) == 80 + 7 + 1
    row.kept_bytes = 7 + 4 * TINY.params
    assert bench._peak_bytes(item, shares._replace(torch_state=False), row) == 80 + 7 + 1


def test_what_has_no_time_says_why(whole_run: Run) -> None:
    measured, printed = whole_run
    tiny = {row.implementation: row for row in measured if row.layout == "tiny"}
    assert tiny["wrong"].status == rows.WRONG
    assert (tiny["wrong"].error or 0) > (tiny["wrong"].tolerance or 1)
    for late in ("", " now", " later"):
        assert tiny[f"too large{late}"].status == rows.NO_ROOM
    assert (tiny["broken"].status, tiny["broken"].detail) == (rows.FAILED, "RuntimeError: broken")
    assert tiny["bitsandbytes"].detail == "bitsandbytes is not installed"
    huge = {row.status for row in measured if row.layout == "huge"}
    assert huge == {rows.NO_ROOM, rows.NOT_AVAILABLE}
    for line in ("wrong           wrong (error", "broken          failed: RuntimeError: broken"):
        assert line in printed


def test_a_run_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench_step.arguments(["--suite", "gpt2", "moe", "--minutes", "0"])
    assert rows.read(bench_step.run(FakeDevice(), options, tmp_path).path) == []
    assert "the time was up before 34 groups, the first of them gpt2, sgd, float32" in (
        capsys.readouterr().out
    )


def test_layouts_and_implementations_are_chosen() -> None:
    given = ["--layouts", "1x64", "--implementations", "torch fused", "--rules", "sgd", "adamw"]
    args = bench_step.arguments([*given, "--storages", "float32", "exact"])
    groups = bench_step.groups(args)
    assert [group.name for group in groups] == [
        "1x64, sgd, float32", "1x64, adamw, float32", "1x64, adamw, exact"]  # fmt: skip
    chosen = bench_step.chosen(groups[0], args.implementations)
    assert [item.name for item in chosen] == [OURS, "torch fused"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--repeats", "1"], ["--rules", "adam"], ["--layouts", "gpt2"],
                  ["--implementations", "torch"]):  # fmt: skip
        with pytest.raises(SystemExit):
            bench_step.arguments(given)
    printed = capsys.readouterr().err
    assert "two at least" in printed and "'adam'" in printed
    assert "--layouts gpt2: there is 1000x1024, 10x100M" in printed
    assert "--implementations torch: there is " in printed
