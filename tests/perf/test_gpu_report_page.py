"""The page of `perf/gpu_report.py`. All numbers here are made up."""

from __future__ import annotations

import csv
from pathlib import Path

from lab import against_torch, embedding_steps, implementations, page
from lab.parts import OK, Record


def _plant(path: Path, *planted: dict[str, object]) -> None:
    """A CSV file of made-up rows; no machine gave them."""
    columns = dict.fromkeys(name for row in planted for name in row)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns])
        writer.writeheader()
        writer.writerows(planted)


def _step(name: str, us: float | str, rule: str = "adagrad", **more: object) -> dict[str, object]:
    row = {"date": "2000-01-01", "suite": "gpt2", "layout": "gpt2", "tensors": 148,
           "params": 124439808, "rule": rule, "storage": "float32", "implementation": name,
           "status": "ok", "gpu_us": us, "host_us": 50}  # fmt: skip
    return {**row, **more}


def _section(written: str, title: str) -> str:
    return written.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_page_says_what_is_ahead_and_what_is_behind(tmp_path: Path) -> None:
    shares = {"percent_of_copy": 91.25, "percent_of_peak": 80}
    _plant(
        tmp_path / "raw" / "step-b.csv",
        {**_step("triton_optim", 700), **shares},
        _step("torch fused", 650, host_us=20),
        _step("torch foreach", 1400),
        _step("torch for-loop", 1),  # nobody's choice
        _step("torch compiled", 1, status="wrong"),
        _step("copy", 1),
        _step("triton_optim", 100, "rmsprop"),
        _step("torch foreach", 249.6, "rmsprop", host_us=50.1),
        _step("triton_optim", "", "sgd", status="failed", detail="RuntimeError: broken"),
        _step("torch foreach", 10, "sgd"),
    )
    _plant(  # an earlier measurement of the same
        tmp_path / "raw" / "step-c.csv",
        _step("triton_optim", 1, date="1999-01-01"),
        _step("torch compiled", 2, date="1999-01-01"),
    )
    page.write(tmp_path, [], {})
    written = (tmp_path / "README.md").read_text()
    assert (
        "- GPU time: ahead of torch in 1 of 2 comparisons, level in 0, **behind in 1**" in written
    )
    assert (
        "- host time: ahead of torch in 0 of 2 comparisons, level in 1, **behind in 1**" in written
    )
    what = "gpt2, gpt2, 148 tensors, 124439808 params, {}, float32".format
    behind = _section(written, "Behind torch").splitlines()
    assert behind[3:] == [
        f"| {what('adagrad')} | host | 50.0 | 20.0 | torch fused | 0.40 |",
        f"| {what('adagrad')} | GPU | 700.0 | 650.0 | torch fused | 0.93 |",
        "",
        f"- no time of ours, {what('sgd')}: failed: RuntimeError: broken",
    ]
    ahead = _section(written, "Ahead of torch").splitlines()
    assert ahead[3:] == [f"| {what('rmsprop')} | GPU | 100.0 | 249.6 | torch foreach | 2.50 |"]
    table = _section(written, "A step of dense gradients: GPU time")
    cells = "700.0 | 91.2 | 80.0 | 650.0 (0.93) | 1400.0 (2.00) | wrong |"
    assert f"| gpt2 | gpt2 | 148 | 124,439,808 | adagrad | float32 | {cells}" in table
    assert "| sgd | float32 | failed |  |  |  | 10.0 |  |" in table


def test_the_page_of_sparse_gradients_and_host_time(tmp_path: Path) -> None:
    shape = {"rule": "adagrad", "tensors": 1, "rows": 1000, "dim": 16, "batch": 9,
             "distribution": "zipf", "status": "ok"}  # fmt: skip
    _plant(
        tmp_path / "raw" / "step-embeddings.csv",
        {**shape, "implementation": "triton_optim", "gpu_us": 2},
        {**shape, "implementation": "torch sparse", "gpu_us": 1},
        {**shape, "implementation": "FBGEMM", "gpu_us": 0.1},
    )
    case = {"rule": "sgd", "tensors": 10, "groups": 1, "gradients": "stay"}
    _plant(
        tmp_path / "raw" / "host.csv",
        {**case, "implementation": "triton_optim", "median": 4},
        {**case, "implementation": "fused", "median": 5},
        {**case, "implementation": "floor", "median": 1},
    )
    page.write(tmp_path, [], {})
    written = (tmp_path / "README.md").read_text()
    sparse = "adagrad, 1 tensors, 1000 rows, 16 dim, 9 batch, zipf"
    assert f"| {sparse} | GPU | 2.0 | 1.0 | torch sparse | 0.50 |" in _section(
        written, "Behind torch"
    )
    assert "No row yet." in _section(written, "A step of dense gradients: GPU time")
    assert "| sgd, 10 tensors, 1 groups, stay | host | 4.0 | 5.0 | fused | 1.25 |" in _section(
        written, "Ahead of torch"
    )


def test_goals_that_were_missed_come_first(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.log").write_text("goals:\n  met     fast: 2x\n  MISSED  faster: 1x\n")
    page.write(tmp_path, ["a"], {"a": Record(OK)})
    goals = _section((tmp_path / "README.md").read_text(), "Goals of this package").splitlines()
    assert goals[3:5] == ["| MISSED | faster: 1x | a |", "| met | fast: 2x | a |"]


def test_names_are_the_benchmarks() -> None:
    step, sparse, host = against_torch.SOURCES
    assert against_torch.OURS == implementations.OURS
    assert {*step.rivals} == {*implementations.TORCH_BEST}
    assert against_torch.COPIES == implementations.COPIES
    assert {*sparse.rivals} == {
        embedding_steps.TORCH_SPARSE, embedding_steps.TORCH_DENSE,
    }  # fmt: skip
    assert {f"torch {name}" for name in host.rivals} < {*implementations.TORCH_BEST}
