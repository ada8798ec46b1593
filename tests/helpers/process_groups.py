"""Scenarios that take several processes: each is run in a process group of its own."""

from __future__ import annotations

import gc
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=30)  # for a process that waits for one that failed
WORLD_TIMEOUT = 600.0  # seconds for all scenarios of a world


class World(NamedTuple):
    """What one process of a scenario knows."""

    size: int
    rank: int
    backend: str
    sizes: tuple[int, ...]  # of all worlds, one after another
    folder: Path  # which they share

    @property
    def device(self) -> torch.device:
        if self.backend == "nccl":
            return torch.device("cuda", self.rank)
        return torch.device("cpu")


class Scenario(NamedTuple):
    """What every process of a world runs; it raises where something is wrong."""

    name: str
    run: Callable[[World], None]
    sizes: tuple[int, ...]  # of the worlds it makes sense in


def outcomes(
    scenarios: Sequence[Scenario], backend: str, sizes: tuple[int, ...], folder: Path
) -> dict[str, str | None]:
    """Run the scenarios in a world of each size.

    Args:
        scenarios: all of them.
        backend: "gloo", on the CPU, or "nccl", on as many GPUs.
        sizes: numbers of processes.
        folder: an empty one.

    Returns:
        By "scenario-size": None, or what went wrong on which rank.
    """
    # A forked process finds torch imported. CUDA does not outlive a fork.
    fork, spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
    make = fork.Process if backend == "gloo" else spawn.Process
    found: dict[str, str | None] = {}
    for size in sizes:
        worlds = [World(size, rank, backend, sizes, folder) for rank in range(size)]
        chosen = [scenario for scenario in scenarios if size in scenario.sizes]
        processes = [make(target=_rank, args=(world, chosen), daemon=True) for world in worlds]
        for process in processes:
            process.start()
        end = time.monotonic() + WORLD_TIMEOUT
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
        for scenario in chosen:
            found[f"{scenario.name}-{size}"] = _together(scenario, worlds)
    return found


def _rank(world: World, scenarios: Sequence[Scenario]) -> None:
    torch.set_num_threads(1)
    if world.backend == "nccl":
        torch.cuda.set_device(world.rank)
    report: dict[str, str | None] = {}
    for scenario in scenarios:
        try:
            with _process_group(world, scenario.name):
                scenario.run(world)
            report[scenario.name] = None
        except BaseException:  # torch's CheckpointException is no Exception
            report[scenario.name] = traceback.format_exc()
        if report[scenario.name] is not None:
            gc.collect()  # what the traceback kept alive of the group
        unfinished = _report(world).with_suffix(".unfinished")
        unfinished.write_text(json.dumps(report))
        unfinished.replace(_report(world))


@contextmanager
def _process_group(world: World, name: str) -> Iterator[None]:
    """A group of this scenario's own: when one process leaves it, the others' waiting ends."""
    dist.init_process_group(
        world.backend,
        init_method=f"file://{world.folder}/{name}-{world.size}.store",
        rank=world.rank,
        world_size=world.size,
        timeout=GROUP_TIMEOUT,
        device_id=world.device if world.backend == "nccl" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _report(world: World) -> Path:
    return world.folder / f"report-{world.size}-{world.rank}.json"


def _together(scenario: Scenario, worlds: Sequence[World]) -> str | None:
    """What went wrong on any rank, or None."""
    wrong = []
    for world in worlds:
        path = _report(world)
        report = json.loads(path.read_text()) if path.exists() else {}
        outcome = report.get(scenario.name, "the process did not get to its end")
        if outcome is not None:
            wrong.append(f"rank {world.rank} of {world.size}: {outcome}")
    return "\n".join(wrong) or None
