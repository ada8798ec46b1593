"""The main job in several processes: one process's curve, and what a killed process leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from lab.checkpoints import last_whole, read
from lab.processes import ends_with_a_message

ROOT = Path(__file__).parents[2]
SCRIPT = "perf/train_lm.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT)
OPTIMIZERS = {"gru": "rmsprop", "transformer": "adagrad"}
SMALL = ("--size", "16", "--batch", "8", "--context", "16", "--lr", "0.05", "--device", "cpu")
STEPS, EVERY = 20, 8
FIRST = f"step-{EVERY:06}"  # checkpoint
# Two processes sum gradients in another order than one. In float32, at these sizes, that moved a
# loss by up to 1e-6, two units in its last place.
TOLERANCE = 1e-5


class Trained(NamedTuple):
    """A run in two processes that nothing interrupted."""

    model: str
    printed: str
    progress: str
    folder: Path


def _command(processes: int, folder: Path, *given: str) -> list[str]:
    script = [SCRIPT] if processes == 1 else TORCHRUN
    return [sys.executable, *script, "--plot", str(folder.with_suffix(".png")), *given]


def _new(model: str, folder: Path, steps: int) -> list[str]:
    kind = ["--model", model, "--optimizer", OPTIMIZERS[model], "--steps", str(steps)]
    saved = ["--save-every", str(EVERY), "--checkpoint", str(folder)]
    return _command(2, folder, "--shard", *SMALL, *kind, *saved)


def _run(command: list[str]) -> tuple[str, str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def _losses(folder: Path) -> list[float]:
    (run,) = folder.iterdir()
    checkpoint = last_whole(run)
    assert checkpoint
    losses: list[float] = read(checkpoint)["losses"]
    return losses


def _only_first(run: Path) -> None:
    """Leave of all checkpoints the first."""
    for checkpoint in run.glob("step-*"):
        if checkpoint.name != FIRST:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoints"
    printed, progress = _run(_new(request.param, folder, STEPS))
    return Trained(request.param, printed, progress, folder)


def test_the_curve_is_that_of_one_process(trained: Trained) -> None:
    """And rank 0 alone shows the progress bar, the table and the picture."""
    rows = [line.split() for line in trained.printed.splitlines()]
    ours, single = (row for row in rows if row[0] == OPTIMIZERS[trained.model])
    assert ours[1] == "triton_optim" and single[1:3] == ["one", "process"]
    assert 0 < float(single[-1]) < TOLERANCE  # 0 would be no other order: nothing was sharded
    assert len(_losses(trained.folder)) == STEPS
    for text in ("unigram entropy", "wrote"):
        assert trained.printed.count(text) == 1
    # A bar of ours and one of the single process: each begins at 0 once.
    assert trained.progress.count(f" 0/{STEPS} ") == 2
    assert trained.folder.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("trained", ["transformer"], indirect=True)
def test_resumed_in_two_processes(trained: Trained, tmp_path: Path) -> None:
    """It ends with the bits of the run that was not interrupted; settings are the checkpoint's."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained.folder, folder)
    (run,) = folder.iterdir()
    _only_first(run)
    options = ("--resume", str(folder), "--device", "cpu", "--against", "nothing")
    printed, _ = _run(_command(2, folder, "--shard", *options))
    assert f"goes on from {run / FIRST}" in printed
    assert _losses(folder) == _losses(trained.folder)


@pytest.mark.parametrize("trained", ["gru"], indirect=True)
def test_one_process_is_killed_and_one_goes_on(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run = folder / f"{OPTIMIZERS[trained.model]}-triton_optim"
    command = _new(trained.model, folder, steps=10**6)
    torchrun = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while not last_whole(run):
            assert torchrun.poll() is None, "ended before it had saved"
            time.sleep(0.05)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = torchrun.communicate()
    finally:
        torchrun.kill()
    assert torchrun.returncode != 0
    (stopped,) = re.findall(r"^rank \d stopped: .*", errors, re.MULTILINE)
    assert stopped.endswith(f"--resume {folder} goes on from {last_whole(run)}")

    _only_first(run)
    options = ("--resume", str(folder), "--device", "cpu", "--steps", str(STEPS))
    printed, _ = _run(_command(1, folder, *options))
    assert f"goes on from {run / FIRST}" in printed
    resumed, whole = _losses(folder), _losses(trained.folder)
    assert resumed[:EVERY] == whole[:EVERY]
    assert resumed == pytest.approx(whole, rel=0, abs=TOLERANCE)


def test_torchrun_ends_a_process() -> None:
    """Even while the main thread is in C, as when it waits for a GPU."""
    code = """if True:
        import hashlib, os, signal
        from lab.processes import ends_with_a_message
        with ends_with_a_message(lambda: "This is how to go on"):
            os.kill(os.getpid(), signal.SIGTERM)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "perf", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(r"rank 0 stopped: SIGTERM .*\. This is how to go on", done.stderr)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="a bug"), ends_with_a_message(lambda: ""):
        raise RuntimeError("a bug")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
