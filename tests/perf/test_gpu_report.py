"""`perf/gpu_report.py` with a stand-in for the GPU: its parts, and what they are given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bench_step
import gpu_report
import pytest
import torch
from gpu_report import PARTS, is_here, report
from lab import parts
from lab.embedding_tables import EMBEDDING_SUITES
from lab.parts import OK, OUT_OF_TIME, SKIPPED, Part
from lab.rules import EMBEDDING_RULES, RULES
from lab.suites import SUITES

ROOT = Path(__file__).parents[2]


def _on_a_stand_in(part: Part) -> Part:
    """The same program over something tiny; the whole test suite soon runs out of time."""
    script, *arguments = part.arguments
    if script == "-m" and arguments[0] == "pytest":
        return part._replace(minutes=3 / 60) if part.name == "tests" else part
    if script == "-m":
        script = {"triton_optim": "triton_optim.__main__"}.get(arguments[0], arguments[0])
        arguments = []
    if part.name == "profile":
        arguments += ["--model", "gru", "--size", "16"]
    return part._replace(
        arguments=(
            "tests/helpers/tiny_programs.py",
            Path(script).name.removesuffix(".py"),
            *arguments,
        )
    )


def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of whole suites, whose command is that of the short benchmark."""
    left_out = [f"step-{suite}" for suite in SUITES]
    made = [_on_a_stand_in(part) for part in PARTS if part.name not in left_out]
    monkeypatch.setattr(gpu_report, "MACHINE", _on_a_stand_in(gpu_report.MACHINE))
    assert is_here(tmp_path)
    report(made, tmp_path, 1e9)
    records = json.loads((tmp_path / "state.json").read_text())
    outcomes = {name: record["outcome"] for name, record in records.items()}
    expected = {part.name: OK for part in (gpu_report.MACHINE, *made)}
    if shutil.which("compute-sanitizer") is None:
        expected["sanitizer"] = SKIPPED
    assert outcomes == {**expected, "tests": OUT_OF_TIME, "plots": OK}
    for pattern in ("raw/step-*.csv", "raw/host.csv", "raw/tune-*.csv",
                    "raw/profile_step.json.gz", "raw/tests.log", "raw/roofline-*.png"):  # fmt: skip
        assert [*tmp_path.glob(pattern)], pattern
    written = (tmp_path / "README.md").read_text()
    for line in ("| GPU | ", "| gpt2 | tiny | 1 | 180 | momentum | float32 | ", "](raw/roofline-",
                 "| adagrad | 1 | 1,000 | 16 | 100 | ",
                 "| sgd | plain | 10 | 1 | fresh | "):  # fmt: skip
        assert line in written


def test_every_suite_has_a_part() -> None:
    asked = []
    for part in PARTS:
        if part.name.startswith("step-") and part.name != "step-formats":
            options = [option.format(minutes=1, raw="x") for option in part.arguments[1:]]
            args = bench_step.arguments(options)
            assert (args.minutes, args.out) == (1, Path("x"))
            asked.append(args.suite)
    assert sorted(asked[0]) == sorted(SUITES)
    assert [suite for (suite,) in asked[1:]] == [*SUITES]


def test_the_short_benchmark_has_a_layout_a_suite() -> None:
    groups = bench_step.groups(bench_step.arguments(["--short"]))
    assert {group.storage.name for group in groups} == {"float32"}
    found = {(group.suite, group.layout.name) for group in groups}
    assert len(found) == len(SUITES)
    assert ("sweep", "1000x1024") in found
    dense = len(found) - len(EMBEDDING_SUITES)
    assert len(groups) == dense * len(RULES) + len(EMBEDDING_SUITES) * len(EMBEDDING_RULES)
    sizes = [group.layout.params for group in groups]
    assert sizes == sorted(sizes)


def test_ten_minutes_give_the_short_benchmark() -> None:
    """Also where all that comes before it takes all the time that it gets."""
    left = 600.0
    given = {}
    for i, part in enumerate(PARTS):
        given[part.name] = parts.limit(part, PARTS[i + 1 :], left)
        left -= given[part.name]
    assert given["step-short"] > 240
    assert given["gpu-tests"] > 120


def test_parts_share_what_is_left() -> None:
    first, second = Part("a", (), 30), Part("b", (), 10)
    assert parts.limit(first, [second], 1200) == 900
    assert parts.limit(second, [], 300) == 300
    assert parts.limit(second, [], 1200) == 600
    assert parts.limit(second, [first], 100) == parts.FLOOR
    assert parts.limit(second, [first], 30) == 30
    assert parts.limit(first._replace(first=True), [second], 1200) == 1200


def test_a_folder_of_another_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(machine: str) -> bool:
        code = f"print('GPU: {machine}\\nmachine: {machine}')"
        monkeypatch.setattr(gpu_report, "MACHINE", Part("machine", ("-c", code), 1))
        return is_here(tmp_path)

    assert here("A") and here("A")
    assert not here("B")
    assert "is of machine: A; here is machine: B: name another --out" in capsys.readouterr().err
    assert (tmp_path / "raw" / "machine.log").read_text().startswith("GPU: A\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    command = [sys.executable, "perf/gpu_report.py", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_report.py reports on a GPU, and torch sees none here.\n"
    assert not folder.exists()
