"""The programs that a newcomer runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import host_rows

import triton_optim
from triton_optim import __main__ as self_check

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_blocks() -> None:
    """Blocks as a newcomer has them."""


def _run(*command: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a newcomer runs it: without a GPU it asks for the interpreter itself."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    printed = _run("-m", "triton_optim")
    assert f"{len(self_check.RULES)} passed, 0 failed" in printed
    assert f"torch {torch.__version__}" in printed


def test_self_check_fails_when_a_rule_is_worse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_check, "RULES", self_check.RULES[:1])
    assert self_check.main() == 0
    rule = triton_optim.SGD.rule

    def slightly_wrong(group: dict[str, Any]) -> tuple[Any, ...]:
        lr, *others = rule.values(group)
        return lr * 1.001, *others

    wrong = replace(rule, hyperparameters=slightly_wrong)
    monkeypatch.setattr(triton_optim.SGD, "rule", wrong)
    assert self_check.main() == 1
    assert "WORSE" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="as it runs where there is no GPU")
def test_host_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is asserted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rules = ("sgd", "rmsprop")
    printed = _run(
        *("perf/bench_host.py", "--tensors", "10", "100", "--repeats", "3", "--rules", *rules),
        *("--out", str(tmp_path / "host.csv")),
    )
    assert "\nlaunch: " in printed and "launch by Triton: " in printed
    assert re.search(r"  triton_optim: sgd \d+\.\d+ s, rmsprop \d+\.\d+ s", printed)
    rows = host_rows.read(tmp_path / "host.csv")
    stepped = [row for row in rows if row.implementation in host_rows.SERIES and row.repeats > 1]
    # two counts and four kinds of gradients, each by 4 or 5; and 100 plain tensors in 20 groups
    assert len(stepped) == 2 * 4 * ((5 + 4) + (4 + 4)) + 5 + 4
    assert {(row.tensors, row.groups) for row in stepped} == {(10, 1), (100, 1), (100, 20)}
    assert len(rows) == len(stepped) + 2 + 2 * len(rules)
    assert (tmp_path / "host.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by", ["triton_optim", "torch"])
def test_profile(by: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = ("perf/profile_step.py", "--model", "gru", "--size", "16", "--context", "8")
    printed = _run(*command, "--by", by, "--trace", str(trace))
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == [
        "forward", "backward", "optimizer",
    ]  # fmt: skip
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"forward", "backward", "optimizer", "Optimizer.step#RMSprop.step"} <= names


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_tuning_needs_a_gpu() -> None:
    assert "torch sees none here" in _run("perf/tune.py", code=2)


def test_main_job(tmp_path: Path) -> None:
    plot = tmp_path / "curves.png"
    printed = _run(
        *("perf/train_lm.py", "--optimizer", "rmsprop", "--against", "torch"),
        *("--size", "32", "--steps", "25", "--batch", "8", "--context", "32", "--plot", str(plot)),
    )
    assert "interpreter" in printed or torch.cuda.is_available()
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in printed.splitlines() if line.startswith("rmsprop ")]
    assert [row[1] for row in rows] == ["triton_optim", "torch"]
    assert float(rows[0][3]) < float(rows[0][2])
    assert float(rows[-1][-1]) < 0.05  # the largest difference of the two loss curves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--text", "no such file"], "no such file"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_main_job_refuses_bad_input(arguments: list[str], message: str) -> None:
    assert message in _run("perf/train_lm.py", *arguments, code=2)
