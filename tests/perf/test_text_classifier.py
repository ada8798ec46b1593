"""The text classifier, as a newcomer runs it, and what makes it fail."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from lab.training import Run
from train_text_classifier import OPTIMIZERS, TOLERANCE, Corpus, arguments, failures, sweep

SCRIPT = "perf/train_text_classifier.py"
ROOT = Path(__file__).parents[2]
SMALL = ("--modules", "10", "--size", "16", "--batch", "32")
# For these sizes and 30 steps, by --sweep.
SMALL_RATES = {"sgd": "5", "adagrad": "0.5"}


def _run(*given: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def _rows(printed: str) -> list[list[str]]:
    lines = [line.split() for line in printed.splitlines()]
    return [line for line in lines if line and line[0] in OPTIMIZERS]


def test_adagrad_is_ahead_of_sgd_and_follows_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plot = tmp_path / "curves.png"
    printed = _run(
        *(*SMALL, "--steps", "30", "--optimizer", *SMALL_RATES, "--lr", *SMALL_RATES.values()),
        *("--against", "torch", "--plot", str(plot)),
    )
    assert "interpreter" in printed or torch.cuda.is_available()
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = _rows(printed)
    assert [row[:2] for row in rows] == [
        [name, by] for name in SMALL_RATES for by in ("triton_optim", "torch")
    ]
    for ours, torchs in zip(rows[::2], rows[1::2], strict=True):
        assert ours[2:6] == torchs[2:6]  # losses, rate and accuracy, as printed
        assert float(torchs[-1]) <= TOLERANCE
        assert float(ours[3]) < float(ours[2])
    sgd, adagrad = rows[0], rows[2]
    assert float(adagrad[3]) < float(sgd[3]) / 2
    assert float(adagrad[5].rstrip("%")) > float(sgd[5].rstrip("%")) + 10


def test_what_torch_lacks_follows_its_reference(tmp_path: Path) -> None:
    """Row-wise Adagrad that of `fused=False`; lazy RMSprop torch's, with dense gradients."""
    printed = _run(
        *(*SMALL, "--steps", "10", "--optimizer", "rowwise_adagrad", "rmsprop"),
        *("--against", "torch", "--plot", str(tmp_path / "curves.png")),
    )
    rows = _rows(printed)
    assert [row[1] for row in rows] == ["triton_optim", "fused=False", "triton_optim", "torch"]
    assert all(float(row[-1]) <= TOLERANCE for row in rows[1::2])


def _corpus() -> Corpus:
    """Ten docstrings of each of three modules, of which one is left out; each has its own word."""
    words = {"json": "parse", "math": "root", "cmd": "prompt"}
    numbers = {"json": range(10), "math": range(10), "cmd": range(9)}
    return Corpus.of({f"{words[m]} THE {m}_{i}": m for m in words for i in numbers[m]}, 2)


def test_corpus() -> None:
    corpus = _corpus()
    train_words, train_labels = corpus.train.tensors
    held_words, held_labels = corpus.held_out.tensors
    assert train_labels.bincount().tolist() == [8, 8]
    assert held_labels.bincount().tolist() == [2, 2]
    # parse, the, eight of json_0 to 9; root, eight of math_0 to 9
    assert sorted(corpus.counts) == [0, *[1] * 16, 8, 8, 16]
    assert train_words.unique().tolist() == list(range(1, 20))
    assert held_words.tolist() == [[1, 2, 0]] * 2 + [[int(held_words[2, 0]), 2, 0]] * 2


def test_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate at which training diverges is not the best."""
    monkeypatch.setattr("train_text_classifier.RATES", [1e30, 0.001, 0.1])
    args = Namespace(
        optimizer=["sgd", "rmsprop"], steps=10, batch=4, size=4, modules=2, device="cpu", sweep=True
    )
    sweep(args, _corpus())
    printed = capsys.readouterr().out
    rows = [row for row in _rows(printed) if len(row) == 4]
    assert [row[:2] for row in rows] == [
        [name, lr] for name in args.optimizer for lr in ("1e+30", "0.001", "0.1")
    ]
    assert rows[0][2] == rows[3][2] == "nan"
    assert float(rows[2][2]) < float(rows[1][2])
    assert "sgd ends lowest at 0.1" in printed and "rmsprop ends lowest at 0.1" in printed


def _curve(optimizer: str, by: str, *losses: float) -> Run:
    return Run(optimizer, by, list(losses), [1.0] * len(losses), {len(losses): 0.5})


@pytest.mark.parametrize(
    ("runs", "failure"),
    [
        (
            [_curve("sgd", "triton_optim", 3.0, 1.0), _curve("adagrad", "triton_optim", 3.0, 1.0)],
            "Adagrad did not end ahead of SGD",
        ),
        (
            [_curve("sgd", "triton_optim", 3.0, 1.0), _curve("sgd", "torch", 3.01, 1.0)],
            "sgd: losses 1.0e-02 apart",
        ),
        ([_curve("adagrad", "triton_optim", 3.0, float("nan"))], "not finite"),
    ],
)
def test_what_fails(runs: list[Run], failure: str) -> None:
    (found,) = failures(runs)
    assert failure in found


def test_exits_with_1_where_adagrad_is_behind(tmp_path: Path) -> None:
    """At a rate that is no good."""
    said = _run(
        *(*SMALL, "--steps", "5", "--optimizer", *SMALL_RATES, "--lr", "5", "1e-6"),
        *("--plot", str(tmp_path / "curves.png")),
        code=1,
    )
    assert "Adagrad did not end ahead of SGD" in said
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--optimizer", "adam"], "adam"),
        (["--lr", "0.1"], "a positive rate for each optimizer"),
        (["--optimizer", "sgd", "--lr", "-1"], "a positive rate for each optimizer"),
        (["--device", "nowhere"], "nowhere"),
        (["--against", "torch", "--sweep"], "not allowed with"),
        (["--plot", "no such folder/curves.png"], "not a file in an existing folder"),
        (["--modules", "1"], "--modules 1: needs 2 to 2"),
        (["--modules", "3"], "--modules 3: needs 2 to 2"),
    ],
)
def test_refuses_bad_input(
    given: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *given])
    monkeypatch.setattr("train_text_classifier.read_docstrings", lambda: {"A": "a", "B": "b"})
    with pytest.raises(SystemExit, match="2"):
        arguments()
    assert message in capsys.readouterr().err
