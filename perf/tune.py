"""Finds how the update kernel should be cut into programs on this GPU. Needs a GPU.

    python perf/tune.py
    python perf/tune.py --layouts large --rules adamw --storages bfloat16 stochastic 8bit

Every config is compiled, in several processes, and checked against torch's for-loop in float64;
then all are timed in turn on large and on small tensors. Prints them by their time over the
default's, writes a CSV file to perf/results, and ends with the line for
triton_optim/launch/tuning.py. Nothing is tuned while training: each trial of an in-place kernel
would be a step.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from lab import rows
from lab.bench import bench
from lab.device import Device
from lab.group import Group, groups_of
from lab.implementations import IMPLEMENTATIONS
from lab.rules import ALL_STORAGES, RULES, Rule
from lab.suites import Layout
from lab.workload import Workload

from triton_optim.launch import backend, tuning
from triton_optim.launch.tuning import Config

RESULTS = Path(__file__).parent / "results"
LAYOUTS = (
    Layout("large", [(f"weight{i}", (4096, 4096)) for i in range(8)]),
    Layout("small", [(f"weight{i}", (32, 64)) for i in range(1000)]),
)
COMPILED = Layout("compiled", [("weight", (4096,))])  # a kernel serves any layout
HALF = {s.name for s in ALL_STORAGES.values() if max(s.param.itemsize, s.state.itemsize) < 4}
OURS = IMPLEMENTATIONS[0]
BLOCK_SIZES = (512, 1024, 2048, 4096)
ELEMENTS_PER_THREAD = (4, 8, 16)
MAX_WARPS = 16
BLOCKS = (2, 4, 8)
NUM_STAGES = (1, 2, 3)
KEPT = 2  # configs that go on to the next stage


class Trial(NamedTuple):
    """One config on one workload."""

    storage: str
    layout: str
    rule: str
    config: Config
    gpu_us: float  # NaN where the config is wrong or does not compile
    relative: float  # to the default config


def sizes(default: Config, lanes: int) -> list[Config]:
    """One block a program: every size and number of warps."""
    configs = [
        Config(size, size // (lanes * elements))
        for size, elements in product(BLOCK_SIZES, ELEMENTS_PER_THREAD)
    ]
    return [default, *(c for c in configs if 1 <= c.num_warps <= MAX_WARPS and c != default)]


def loops(best: Sequence[Config]) -> list[Config]:
    """Several blocks a program, pipelined or not."""
    return [
        config._replace(blocks=blocks, num_stages=stages)
        for config, blocks, stages in product(best, BLOCKS, NUM_STAGES)
    ]


def evictions(best: Sequence[Config]) -> list[Config]:
    """Gradients and state leave the cache first."""
    return [config._replace(eviction="evict_first") for config in best]


class Tuner:
    """Times configs.

    Args:
        device: where.
        workloads: on what.
        default: the config that the others are compared with.
        repeats: how often each is timed, at the most.
        stop: the `time.monotonic()` after which no further repeat begins.
        pool: processes that compile them before.
    """

    def __init__(
        self, device: Device, workloads: Sequence[Group], default: Config, repeats: int,
        stop: float, pool: Executor | None = None,
    ) -> None:  # fmt: skip
        self._device, self._workloads, self._default = device, workloads, default
        self._repeats, self._stop, self._pool = repeats, stop, pool
        self.trials: list[Trial] = []

    def run(self, lanes: int) -> list[tuple[Config, float]]:
        """All configs that are right everywhere, with their mean relative time, best first."""
        self._try(sizes(self._default, lanes))
        for stage in (loops, evictions):
            self._try([self._default, *stage([config for config, _ in self.ranked()[:KEPT]])])
        return self.ranked()

    def ranked(self) -> list[tuple[Config, float]]:
        relative: dict[Config, list[float]] = {}
        for trial in self.trials:
            relative.setdefault(trial.config, []).append(trial.relative)
        means = {config: geometric_mean(times) for config, times in relative.items()}
        right = ((config, mean) for config, mean in means.items() if mean == mean)
        return sorted(right, key=lambda item: item[1])

    def _try(self, configs: Sequence[Config]) -> None:
        """All configs on all workloads, each first checked."""
        named = {str(config): config for config in configs}
        kinds = {(group.rule.name, group.storage.name): None for group in self._workloads}
        if self._pool is not None:
            tasks = [(*kind, config) for kind in kinds for config in configs]
            [*self._pool.map(_compile, *zip(*tasks, strict=True))]
        items = [
            OURS._replace(name=name, build=partial(_build, config))
            for name, config in named.items()
        ]
        for group in self._workloads:
            limits = (self._repeats, self._stop)
            timed = bench(self._device, group, rows.Row(), *limits, implementations=items)
            measured = {row.implementation: row for row in timed if row.implementation in named}
            default = measured[str(self._default)].gpu_us or math.nan
            for name, row in measured.items():
                if row.detail:
                    print(f"{name}: {row.detail}")
                us = row.gpu_us or math.nan
                which = (group.storage.name, group.layout.name, group.rule.name)
                self.trials.append(Trial(*which, named[name], us, us / default))


def _compile(rule: str, storage: str, config: Config) -> None:
    """In a process of the pool, into Triton's cache. What fails here fails there too."""
    named = next(one for one in RULES if one.name == rule)
    with suppress(Exception):
        step = Workload(COMPILED, named, ALL_STORAGES[storage], Device.type)
        step.build(OURS._replace(build=partial(_build, config)))()


def _build(config: Config, rule: Rule, params: Any) -> Any:
    """Our optimizer, as far as a workload asks for it."""
    optimizer = OURS.build(rule, params)
    return SimpleNamespace(state=optimizer.state, step=forced(config)(optimizer.step))


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Launches that are made meanwhile are cut up so."""
    with patch.object(backend, "config", lambda *_: config):
        yield


def workloads(
    layouts: Collection[str], rules: Collection[str], storages: Collection[str]
) -> Iterator[Group]:
    """On all of which every config is timed."""
    for layout in LAYOUTS:
        for group in groups_of("tune", layout):
            names = (
                layout.name in layouts,
                group.rule.name in rules,
                group.storage.name in storages,
            )
            if all(names) and not OURS.refusal(group.rule, group.storage):
                yield group


def write(path: Path, trials: Iterable[Trial], machine: Mapping[str, str]) -> None:
    """The trials as CSV."""
    workload = ("storage", "layout", "rule")
    columns = [*machine, *workload, *Config._fields, "gpu_us", "relative"]
    lines = (
        {**machine, **dict(zip(workload, trial, strict=False)), **trial.config._asdict(),
         "gpu_us": f"{trial.gpu_us:.3f}", "relative": f"{trial.relative:.4f}"}
        for trial in trials
    )  # fmt: skip
    rows.write(path, columns, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run")
    parser.add_argument("--repeats", type=int, default=10)
    known = {"layouts": [one.name for one in LAYOUTS], "rules": [one.name for one in RULES]}
    for option, choices in known.items():
        parser.add_argument(f"--{option}", nargs="+", choices=choices, default=choices)
    chosen = ["float32", "bfloat16"]
    parser.add_argument("--storages", nargs="+", choices=[*ALL_STORAGES], default=chosen)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: a spread needs two at least")
    if not torch.cuda.is_available():
        print("tune.py times a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    import triton

    device = Device()
    here = torch.device("cuda", 0)
    architecture = backend.architecture(here)
    lanes = torch.cuda.get_device_properties(here).warp_size
    begin, best, trials = time.monotonic(), {}, []
    kinds = {"wide": {*args.storages} - HALF, "half": {*args.storages} & HALF}
    asked = {kind: names for kind, names in kinds.items() if names}
    for i, (kind, names) in enumerate(asked.items(), start=1):
        default = tuning.config(architecture, half=kind == "half")
        stop = begin + 60 * args.minutes * i / len(asked)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            groups = [*workloads(args.layouts, args.rules, names)]
            tuner = Tuner(device, groups, default, args.repeats, stop, pool)
            ranked = tuner.run(lanes)
        if not ranked:
            print(f"nothing is right here, not even the default {default}", file=sys.stderr)
            return 1
        trials += tuner.trials
        best[kind] = ranked[0][0]
        print(f"\n{', '.join(sorted(names))}: time over that of {default}")
        for config, mean in ranked:
            print(f"{mean:8.3f}  {config}")
    path = args.out / f"tune-{architecture}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.csv"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    write(path, trials, {"gpu": device.name, "driver": device.driver(), **versions})
    print(f"\nwrote {path}; for TUNED in triton_optim/launch/tuning.py:")
    pair = ", ".join(f"{kind}={config}" for kind, config in best.items())
    print(f'    "{architecture}": Pair({pair}),')
    return 0


if __name__ == "__main__":
    sys.exit(main())
