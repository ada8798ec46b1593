"""The options of the main job: what does not go together, and what a checkpoint decides."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from lab.options import CHECKPOINTS, arguments

Patch = pytest.MonkeyPatch


def _arguments(patch: Patch, *given: str, processes: int = 1) -> Namespace:
    patch.setattr(sys, "argv", ["train_lm.py", "--device", "cpu", *given])
    patch.setenv("WORLD_SIZE", str(processes))
    args, _ = arguments("")
    return args


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Of checkpoints as a sharded run leaves them; other.txt is beside it."""
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("another text" * 100)
    checkpoint = CHECKPOINTS / "rmsprop-triton_optim" / "step-000100"
    settings = _arguments(
        monkeypatch, "--shard", "--size", "64", "--optimizer", "rmsprop", "--lr", "0.01"
    ).settings
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    (checkpoint / "run.json").write_text(json.dumps({"settings": settings, "losses": []}))
    return CHECKPOINTS


def test_a_checkpoint_gives_the_settings(folder: Path, monkeypatch: Patch) -> None:
    args = _arguments(monkeypatch, "--resume", str(folder), "--steps", "400")
    assert (args.size, args.lr, args.optimizer, args.steps) == (64, 0.01, ["rmsprop"], 400)
    assert args.max_grad_norm == 1 and not args.shard and args.against == "nothing"
    assert args.folder == folder


def test_what_is_sharded_is_clipped_and_saved(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = _arguments(monkeypatch)
    assert (plain.max_grad_norm, plain.folder, plain.against) == (None, None, "nothing")
    sharded = _arguments(monkeypatch, "--shard", processes=2)
    assert (sharded.max_grad_norm, sharded.folder, sharded.against) == (1, CHECKPOINTS, "single")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--resume nowhere", "--resume nowhere: no whole checkpoint"),
        ("--resume other.txt", "--resume other.txt: no whole checkpoint"),
        ("--resume train_lm_checkpoints --size 32", "--size 32: the checkpoints of"),
        ("--resume train_lm_checkpoints --max-grad-norm 2", "--max-grad-norm 2.0: the checkp"),
        ("--resume train_lm_checkpoints --text other.txt", "--text: not the bytes"),
        ("--resume train_lm_checkpoints --steps 99", "--steps 99: train_lm_checkpoints/rmsprop"),
        ("--resume train_lm_checkpoints --checkpoint new", "not allowed with"),
        ("--shard", "step-000100 is there already: --resume train_lm_checkpoints goes on"),
        ("--checkpoint other.txt", "other.txt is not a folder"),
        ("--against single", "--against single: needs --shard"),
        ("--max-grad-norm 0", "'0' is not positive"),
        ("--lr inf", "--lr inf: must be finite"),
        ("--precision exact --against torch", "--precision: without --shard, --checkpoint"),
        ("--precision exact --checkpoint new", "--precision: without --shard, --checkpoint"),
        ("--seeds 2", "--seeds and --csv: with a --precision beside float32"),
        ("--optimizer adam lion --against torch", "--against torch: torch has no lion"),
    ],
)
def test_refuses(
    given: str,
    message: str,
    folder: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _arguments(monkeypatch, *given.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--shard --batch 7", "--batch 7: 2 processes cannot share it out evenly"),
        ("--batch 8", "2 processes: they train together with --shard"),
    ],
)
def test_two_processes_refuse(
    given: str, message: str, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _arguments(monkeypatch, *given.split(), processes=2)
    assert message in capsys.readouterr().err
