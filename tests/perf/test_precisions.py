"""perf/train_lm.py --precision: what is compared with what, and the memory that it prints."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from lab import compared
from lab.training import Run

ROOT = Path(__file__).parents[2]
SMALL = ("--size", "16", "--batch", "4", "--context", "16", "--device", "cpu")
BYTES = {"float32": 8, "bfloat16": 4, "stochastic": 4, "exact": 8}  # with one state


@pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "soak", reason="trains for a minute: soak profile"
)
def test_bfloat16_stalls_and_the_others_do_not(tmp_path: Path) -> None:
    """At a rate that is small beside the parameters."""
    plot, losses = tmp_path / "curves.png", tmp_path / "losses.csv"
    done = subprocess.run(
        [sys.executable, "perf/train_lm.py", *SMALL, "--optimizer", "rmsprop", "--lr", "0.0002",
         "--steps", "40", "--seeds", "2", "--precision", *BYTES,
         "--plot", str(plot), "--csv", str(losses)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("rmsprop ")]
    rows = {row[1]: [float(value) for value in row[2:]] for row in table}
    assert {name: row[1] for name, row in rows.items()} == BYTES
    progress = rows["float32"][2] - rows["float32"][3]
    assert progress > 0.02
    higher = {name: row[5] for name, row in rows.items()}
    assert higher.pop("float32") == 0
    assert higher.pop("bfloat16") > progress / 5
    assert all(abs(value) < progress / 30 for value in higher.values()), higher
    with losses.open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(BYTES) * 2 * 40
    last = [float(row["loss"]) for row in written if row["precision"] == "exact"][-10:]
    assert fmean(last) < rows["exact"][2]


def run(precision: str, seed: int, *losses: float) -> Run:
    return Run("sgd", "triton_optim", [*losses], [1.0], {}, precision, seed, 4.0)


def test_differences_are_those_of_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run("float32", 0, *[1.0] * 20), run("float32", 1, *[3.0] * 20)]
    groups = compared.of([*runs, run("exact", 0, *[1.5] * 20), run("exact", 1, *[3.5] * 20)])
    assert [group.precision for group in groups] == ["float32", "exact"]
    assert groups[1].apart == [0.5, 0.5]
    assert bool((groups[1].differences == 0.5).all())
    compared.report(groups)
    exact = capsys.readouterr().out.splitlines()[2].split()
    assert exact[5:9] == ["2.500", "1.414", "0.5000", "0.0000"]
