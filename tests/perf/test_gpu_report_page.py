"""The page of `perf/gpu_report.py`. All numbers here are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab import host_rows, page, rows
from lab.rows import COPY, OURS, TORCH_BEST, Row, Table

SLOWEST_FIRST = "Beside torch, what is slowest first"


def _step(name: str, us: float | None, rule: str = "adagrad", **more: Any) -> Row:
    """A made-up row; no machine gave it."""
    row = Row(
        date="2000-01-01", suite="gpt2", layout="gpt2", tensors=148, params=124439808, rule=rule,
        storage="float32", implementation=name, status=rows.OK, gpu_us=us, wall_us=us, host_us=50,
    )  # fmt: skip
    vars(row).update(more)
    return row


def _sections(folder: Path) -> dict[str, list[str]]:
    """The lines of the page by title; of what comes before the titles, by none."""
    page.write(folder, [], {})
    head, *others = (folder / "README.md").read_text().split("\n## ")
    titled = (part.strip().split("\n\n", 1) for part in others)
    return {"": head.splitlines(), **{title: text.splitlines() for title, text in titled}}


def test_the_page_says_what_is_ahead_and_what_is_behind(tmp_path: Path) -> None:
    Table(tmp_path / "raw" / "step-b.csv").add([
        _step(OURS, 700, percent_of_copy=91.25, percent_of_peak=80.0),
        _step("torch fused", 650, host_us=20, wall_us=700),
        _step("torch foreach", 1400),
        _step("torch for-loop", 1),  # nobody's choice
        _step("torch compiled", 1, status=rows.WRONG),
        _step(COPY, 1),
        _step(OURS, 100, "rmsprop"),
        _step("torch foreach", 249.6, "rmsprop", host_us=50.1),
        _step(OURS, None, "sgd", status=rows.FAILED, detail="RuntimeError: broken"),
        _step("torch foreach", 10, "sgd"),
        _step("torch fused", 10, "momentum"),
    ])  # fmt: skip
    earlier = Table(tmp_path / "raw" / "step-c.csv")  # of the same
    names = ((OURS, "adagrad"), ("torch compiled", "adagrad"), ("torch fused", "rmsprop"))
    earlier.add(_step(name, 1, rule, date="1999-01-01") for name, rule in names)
    written = _sections(tmp_path)
    for line in (
        "- GPU time: ahead of torch in 1 of 2 comparisons, level in 0, **behind in 1**",
        "- host time: ahead of torch in 0 of 2 comparisons, level in 1, **behind in 1**",
        "- wall time: ahead of torch in 1 of 2 comparisons, level in 1, **behind in 0**",
        "- **without a time of ours** where torch has one: 2",
    ):
        assert line in written[""]
    what = "gpt2, gpt2, 148 tensors, 124439808 params, {}, float32".format
    found = written[SLOWEST_FIRST]
    assert [line for line in found[2:] if "| wall |" not in line and "| 1.00 |" not in line] == [
        f"| {what('adagrad')} | host | 50.0 | 20.0 | torch fused | 0.40 |",
        f"| {what('adagrad')} | GPU | 700.0 | 650.0 | torch fused | 0.93 |",
        f"| {what('rmsprop')} | GPU | 100.0 | 249.6 | torch foreach | 2.50 |",
        "",
        f"- no time of ours, {what('sgd')}: failed: RuntimeError: broken",
        f"- no time of ours, {what('momentum')}: no row",
    ]
    table = written["A step of dense gradients: GPU time"]
    of_gpt2 = "| gpt2 | gpt2 | 148 | 124,439,808 |"
    # Percentages, and torch's foreach, fused and compiled step.
    cells = "700.0 | 91.2 | | 80.0 | 1400.0 (2.00) | 650.0 (0.93) | wrong |"
    assert f"{of_gpt2} adagrad | float32 | {cells}" in table
    assert f"{of_gpt2} sgd | float32 | failed | | | | 10.0 | | |" in table


def test_the_page_of_sparse_gradients_and_host_time(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "tensors": 1,
        "rows": 1000,
        "dim": 16,
        "batch": 9,
        "distribution": "zipf",
    }
    Table(tmp_path / "raw" / "step-embeddings.csv").add(
        _step(name, us, host_us=None, **shape)
        for name, us in ((OURS, 2), ("torch sparse", 1), ("FBGEMM", 0.1))
    )
    host_rows.write(tmp_path / "raw" / "host.csv", [
        host_rows.Row("m", "sgd", params, 10, 1, "stay", name, 9, us + more, us, us)
        for params, more in (("plain", 0.0), ("dtensor", 1.0))
        for name, us in ((OURS, 4.0), ("fused", 5.0), ("floor", 1.0))
    ])  # fmt: skip
    written = _sections(tmp_path)
    assert written["A step of dense gradients: GPU time"] == ["No row yet."]
    assert [line for line in written[SLOWEST_FIRST][2:] if "| wall |" not in line] == [
        "| adagrad, 1 tensors, 1000 rows, 16 dim, 9 batch, zipf | GPU | 2.0 | 1.0 | torch sparse "
        "| 0.50 |",
        "| sgd, dtensor, 10 tensors, 1 groups, stay | host | 5.0 | 6.0 | fused | 1.20 |",
        "| sgd, plain, 10 tensors, 1 groups, stay | host | 4.0 | 5.0 | fused | 1.25 |",
    ]


def test_goals_that_were_missed_come_first(tmp_path: Path) -> None:
    sweep: dict[str, Any] = {"suite": "sweep", "wall_us": 9.0}
    Table(tmp_path / "raw" / "step-sweep.csv").add(
        [_step(OURS, 20, **sweep), *(_step(name, 10, **sweep) for name in TORCH_BEST)]
    )
    goals = _sections(tmp_path)["Goals of this package"]
    met = [line.split(" | ")[0] for line in goals[2:]]
    assert met == ["| MISSED", "| met"] or met == ["| MISSED", "| MISSED", "| met"]
    assert "torch's own in the sweep, GPU time | 0.50x (gpt2, adagrad, float32) |" in goals[2]
