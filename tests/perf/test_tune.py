"""perf/tune.py without its GPU: what is tried, what is chosen, what is thrown out."""

from __future__ import annotations

import csv
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab.device
import pytest
import tune
from assertions import updates_among
from fake_device import FakeDevice
from lab.rules import RULES, STORAGES
from lab.suites import Layout
from lab.workload import Workload
from tune import Trial, Tuner

from triton_optim.launch import tuning
from triton_optim.launch.kernel_args import Tables
from triton_optim.launch.launcher import LaunchSpec, UpdateLaunch, record_launches
from triton_optim.launch.tuning import Config
from triton_optim.rule import Rule

DEFAULT = Config(64, 1)


def test_every_candidate_can_be_launched() -> None:
    for lanes in (32, 64):
        default = tuning.config("gfx942" if lanes == 64 else "sm_90", half=False)
        sizes = tune.sizes(default, lanes)
        assert sizes[0] == default
        assert len(set(sizes)) == len(sizes)
        for config in [*sizes, *tune.loops(sizes[:2]), *tune.evictions(sizes[:2])]:
            assert config.block_size.bit_count() == config.num_warps.bit_count() == 1
            assert config.block_size % (config.num_warps * lanes) == 0
            assert config.num_warps <= 16


def _tuner(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    monkeypatch.setattr(tune, "LAYOUTS", (Layout("tiny", [("weight", (10, 20))]),))
    monkeypatch.setattr(tune, "sizes", lambda *_: [DEFAULT, Config(128, 1), Config(256, 1)])
    groups = [*tune.workloads(["tiny"], ["momentum"], ["float32"])]
    return Tuner(FakeDevice(), groups, DEFAULT, 2, time.monotonic())


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuner = _tuner(monkeypatch)
    ranked = tuner.run(32)
    configs = {config for config, _ in ranked}
    assert {DEFAULT, Config(128, 1), Config(256, 1)} <= configs
    assert any(config.blocks == 8 and config.num_stages == 3 for config in configs)
    assert any(config.eviction == "evict_first" for config in configs)
    times = [mean for _, mean in ranked]
    assert times == sorted(times)
    tune.write(tmp_path / "tune.csv", tuner.trials, {"gpu": "made-up"})
    with (tmp_path / "tune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tuner.trials)
    assert {row["layout"] for row in rows} == {"tiny"}
    assert {row["relative"] for row in rows if row["block_size"] == "64" and row["blocks"] == "1"
            and not row["eviction"]} == {"1.0000"}  # fmt: skip


def test_configs_are_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for every rule and storage, in the processes of a pool; here in this one."""
    monkeypatch.setattr(lab.device.Device, "type", FakeDevice.type)
    configs = [Config(64, 1), Config(128, 1)]
    with record_launches() as launches:
        for config in configs:
            tune._compile("momentum", "exact16", config)
    assert [launch.grid[0] for launch in updates_among(launches)] == [64, 32]
    asked: list[tuple[object, ...]] = []
    tuner = _tuner(monkeypatch)
    tuner._pool = ThreadPoolExecutor()
    monkeypatch.setattr(tune, "_compile", lambda *task: asked.append(task))
    tuner._try(configs)
    assert sorted(asked) == [("momentum", "float32", config) for config in configs]


def test_a_config_that_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose launches fail, and one that leaves the last chunk out."""
    tuner = _tuner(monkeypatch)
    make = UpdateLaunch.__init__

    def faulty(self: UpdateLaunch, rule: Rule, spec: LaunchSpec, tables: Tables) -> None:
        if spec.config.block_size == 256:
            raise RuntimeError("out of registers")
        if spec.config.block_size == 128:
            spec = spec._replace(block_to_tensor=spec.block_to_tensor[:-1])
        make(self, rule, spec, tables)

    monkeypatch.setattr(UpdateLaunch, "__init__", faulty)
    tuner._try([DEFAULT, Config(128, 1), Config(256, 1)])
    assert tuner.ranked() == [(DEFAULT, 1.0)]


def test_where_every_config_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = _tuner(monkeypatch)

    def failing(*_: object) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(UpdateLaunch, "__init__", failing)
    assert tuner.run(32) == []


def test_the_mean_is_over_everything() -> None:
    tuner = Tuner(FakeDevice(), [], DEFAULT, 2, 0.0)
    other = Config(128, 1)
    for layout, relative in (("a", 0.5), ("b", 1.0)):
        tuner.trials.append(Trial("float32", layout, "sgd", DEFAULT, 1.0, 1.0))
        tuner.trials.append(Trial("float32", layout, "sgd", other, relative, relative))
    assert tuner.ranked() == [(other, pytest.approx(0.5**0.5)), (DEFAULT, 1.0)]


def test_a_forced_config_is_launched() -> None:
    layout = Layout("tiny", [("weight", (10, 20))])
    workload = Workload(layout, RULES[0], STORAGES[0], FakeDevice.type)
    with record_launches() as launches:
        for config in (Config(64, 1, blocks=2), Config(64, 1)):
            with tune.forced(config):
                workload.build(tune.OURS)()
    assert [launch.grid[0] for launch in launches] == [2, 4]
