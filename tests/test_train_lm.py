"""The main job in several processes: one process's curve, and what a killed process leaves."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from lab.checkpoints import last_whole, read, step_of
from lab.processes import ends_with_a_message

ROOT = Path(__file__).parent.parent
SCRIPT = "perf/train_lm.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT)
OPTIMIZERS = {"gru": "rmsprop", "transformer": "momentum"}
STEPS, EVERY = 25, 10
# Two processes sum gradients in another order than one. In float32, at these sizes, that moved a
# loss by up to 1e-6, two units in its last place.
TOLERANCE = 1e-5


class Trained(NamedTuple):
    """A run in two processes that was not interrupted."""

    printed: str
    progress: str
    folder: Path
    losses: list[float]


def _command(*given: str) -> list[str]:
    return [sys.executable, *given]


def _run(*given: str) -> tuple[str, str]:
    done = subprocess.run(_command(*given), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def _options(folder: Path, model: str, steps: int) -> list[str]:
    sizes = ["--size", "16", "--batch", "8", "--context", "16", "--lr", "0.05", "--device", "cpu"]
    kind = ["--model", model, "--optimizer", OPTIMIZERS[model], "--steps", str(steps)]
    saved = ["--save-every", str(EVERY), "--checkpoint", str(folder)]
    return ["--shard", *sizes, *kind, *saved, "--plot", f"{folder}.png"]


def _losses(folder: Path, model: str, step: int = STEPS) -> list[float]:
    checkpoint = last_whole(folder / f"{OPTIMIZERS[model]}-triton_optim")
    assert checkpoint and step_of(checkpoint) == step
    losses: list[float] = read(checkpoint)["losses"]
    return losses


@pytest.fixture(scope="module", params=OPTIMIZERS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(model) / "checkpoints"
    printed, progress = _run(*TORCHRUN, *_options(folder, model, STEPS))
    return Trained(printed, progress, folder, _losses(folder, model))


def test_the_curve_is_that_of_one_process(model: str, trained: Trained) -> None:
    """Rank 0 alone shows the bar, the table and the picture."""
    rows = [line.split() for line in trained.printed.splitlines() if line.startswith(OPTIMIZERS[model])]
    ours, single = rows
    assert ours[1] == "triton_optim" and single[1:3] == ["one", "process"]
    assert float(single[-1]) < TOLERANCE
    assert trained.printed.count("unigram entropy") == trained.printed.count("wrote") == 1
    assert trained.progress.count(f"{STEPS}/{STEPS}") >= 2  # the single process's too
    assert Path(f"{trained.folder}.png").read_bytes().startswith(b"\x89PNG")
