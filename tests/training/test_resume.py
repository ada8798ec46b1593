"""A training process that is killed again and again ends where one that never was ends."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import resumable_training
import torch
from assertions import assert_same_bits

KILLS = 50
ENDLESS = sys.maxsize
# How long each part takes, roughly, in seconds: a kill falls somewhere in it.
DURATIONS = {"load": 0.02, "train": 0.05, "save": 0.003}
# The package, and what torch and Triton import at a first step.
PRELOAD = ["triton_optim", "torch._dynamo", "triton.experimental.gluon"]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> ForkServerContext:
    """Starts processes, kernels interpreted, that find torch imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    return forkserver


@contextmanager
def _training(
    context: ForkServerContext, path: Path, steps: int
) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """A process that trains, and where it reports."""
    reports, report = context.Pipe(duplex=False)
    process = context.Process(
        target=resumable_training.train, args=(path, steps, report), daemon=True
    )
    process.start()
    report.close()
    with reports:
        yield process, reports


def _finish(context: ForkServerContext, path: Path, steps: int) -> None:
    with _training(context, path, steps) as (process, _):
        process.join()
    assert process.exitcode == 0


def _kill(context: ForkServerContext, path: Path, chance: random.Random) -> tuple[int, str]:
    """Train, and kill some time after some report. Returns the last report before death."""
    with _training(context, path, ENDLESS) as (process, reports):
        last: tuple[int, str]
        for _ in range(chance.randrange(1, 7)):
            last = reports.recv()
        time.sleep(chance.uniform(0, DURATIONS[last[1]]))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while reports.poll():
            try:
                last = reports.recv()
            except EOFError:
                break
    return last


def test_killed_training_resumes_to_the_same_bits(
    context: ForkServerContext, tmp_path: Path
) -> None:
    """Three optimizers and their schedules, in and between steps and saves."""
    killed, whole = tmp_path / "killed.pt", tmp_path / "whole.pt"
    chance = random.Random(0)
    deaths = [_kill(context, killed, chance) for _ in range(KILLS)]
    steps = torch.load(killed, weights_only=True)["step"] + 3
    _finish(context, killed, steps)
    _finish(context, whole, steps)
    assert_same_bits(*(torch.load(path, weights_only=True) for path in (killed, whole)))
    # It got on between the kills, and they fell in steps and in saves.
    assert len({step for step, _ in deaths}) >= KILLS // 5
    assert {doing for _, doing in deaths} >= {"train", "save"}
