"""`perf/gpu_report.py` with a stand-in for the GPU, and with stand-ins for its parts."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_step
import gpu_report
import pytest
import torch
from fake_device import FakeDevice
from gpu_report import PARTS, is_here, report
from lab import parts
from lab.embedding_tables import EMBEDDING_SUITES
from lab.parts import FAILED, OK, OUT_OF_TIME, SKIPPED, Part, Record
from lab.rules import EMBEDDING_RULES, RULES
from lab.suites import SUITES

ROOT = Path(__file__).parents[2]
NEVER = 1e9  # seconds
SECONDS = 1 / 60  # of a part's minutes


def _part(name: str, code: str, minutes: float = 1, **more: Any) -> Part:
    return Part(name, ("-c", code), minutes, **more)


def _report(folder: Path, *made: Part, chosen: Sequence[str] | None = None) -> dict[str, Any]:
    """The records that a call leaves, by part."""
    report(made, folder, NEVER, chosen)
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def _page(folder: Path) -> str:
    return (folder / "README.md").read_text()


def _on_a_stand_in(part: Part) -> Part:
    """The same program over something tiny; the whole test suite soon runs out of time."""
    script, *arguments = part.arguments
    if script == "-m" and arguments[0] == "pytest":
        return part._replace(minutes=3 * SECONDS) if part.name == "tests" else part
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
    outcomes = {name: record["outcome"] for name, record in _report(tmp_path, *made).items()}
    expected = {part.name: OK for part in (gpu_report.MACHINE, *made)}
    if shutil.which("compute-sanitizer") is None:
        expected["sanitizer"] = SKIPPED
    assert outcomes == {**expected, "tests": OUT_OF_TIME, "plots": OK}
    for pattern in ("raw/step-*.csv", "raw/host.csv", "raw/tune-*.csv",
                    "raw/profile_step.json.gz", "raw/tests.log", "raw/roofline-*.png"):  # fmt: skip
        assert [*tmp_path.glob(pattern)], pattern
    written = _page(tmp_path)
    for line in ("| GPU | ", "| gpt2 | tiny | 1 | 180 | momentum | float32 | ", "](raw/roofline-",
                 "| adagrad | 1 | 1,000 | 16 | 100 | ",
                 "| sgd | plain | 10 | 1 | fresh | "):  # fmt: skip
        assert line in written


def test_every_suite_has_a_part() -> None:
    asked = []
    for part in PARTS:
        if part.name.startswith("step-"):
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


def test_a_part_that_fails_ends_nothing(tmp_path: Path) -> None:
    fails = _part("fails", "print('before'); raise ValueError('broken | here')")
    crashes = _part("crashes", "import os; print('a\\nb'); os.abort()")
    records = _report(tmp_path, fails, crashes, _part("works", "print('done\\n')"))
    assert {name: record["outcome"] for name, record in records.items()} == {
        "fails": FAILED, "crashes": FAILED, "works": OK,
    }  # fmt: skip
    assert records["fails"]["detail"] == "exit status 1: ValueError: broken | here"
    assert records["crashes"]["detail"] == "exit status -6: b"
    assert records["works"]["detail"] == "done"
    written = _page(tmp_path)
    assert "- parts that are failed: fails, crashes\n" in written
    assert "### fails: failed\n\n```text\nbefore\nTraceback" in written
    assert "### works" not in written


def test_a_part_that_runs_out_of_time_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GRACE", 0.5)
    lock = tmp_path / "lock"
    locks = (
        "import fcntl, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked'); time.sleep(600)"
    )
    code = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {locks!r}]); time.sleep(600)"
    )
    records = _report(tmp_path, _part("slow", code, 4 * SECONDS), _part("next", ""))
    assert (records["slow"]["outcome"], records["next"]["outcome"]) == (OUT_OF_TIME, OK)
    assert "```text\nlocked\n" in _page(tmp_path)
    with lock.open() as file:
        for _ in range(100):  # a killed process may take a moment to go
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            pytest.fail("what the part started still runs")


def test_at_its_limit_a_part_may_say_what_it_knows(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('3 failed so far')"
    records = _report(tmp_path, _part("slow", code, 3 * SECONDS))
    assert (records["slow"]["outcome"], records["slow"]["detail"]) == (
        OUT_OF_TIME, "3 failed so far",
    )  # fmt: skip


def test_a_benchmark_that_left_something_out_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = bench_step.arguments(["--suite", "gpt2", "--minutes", "0"])
    bench_step.run(FakeDevice(), args, tmp_path)
    printed = capsys.readouterr().out
    records = _report(tmp_path, _part("step", f"print({printed!r})"))
    assert records["step"]["outcome"] == OUT_OF_TIME


def test_another_call_goes_on(tmp_path: Path) -> None:
    """What was never begun first, then what ran out of time, then what failed."""
    ran = tmp_path / "ran"

    def part(name: str, code: str = "", minutes: float = 1) -> Part:
        note = f"print({name!r}, file=open({str(ran)!r}, 'a'))"
        return _part(name, f"{note}\n{code}", minutes)

    def names() -> list[str]:
        found = ran.read_text().split()
        ran.unlink()
        return found

    fails = part("fails", "raise SystemExit(3)")
    slow = part("slow", "import time; time.sleep(600)", 3 * SECONDS)
    begun = (fails, slow, part("works"))
    _report(tmp_path, *begun)
    assert names() == ["fails", "slow", "works"]
    mended = (part("fails"), part("slow"), part("works"), part("new"))
    records = _report(tmp_path, *mended)
    assert names() == ["new", "slow", "fails"]
    assert {record["outcome"] for record in records.values()} == {OK}
    _report(tmp_path, *mended)
    assert not ran.exists()
    _report(tmp_path, *mended, chosen=["works"])
    assert names() == ["works"]


def test_nothing_is_begun_when_the_minutes_are_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report([_part("a", "")], tmp_path, time.monotonic() + 1)
    assert "the minutes are over before a" in capsys.readouterr().out
    assert "| a | not begun yet |" in _page(tmp_path)


def test_what_ends_the_report_leaves_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _report(tmp_path, _part("a", ""))
    (tmp_path / "README.md").unlink()

    def interrupted(*_: object) -> Record:
        raise KeyboardInterrupt

    made = (_part("a", ""), _part("b", ""))
    with monkeypatch.context() as patched:
        patched.setattr(gpu_report, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _report(tmp_path, *made)
    assert "| b | not begun yet |" in _page(tmp_path)
    assert _report(tmp_path, *made)["b"]["outcome"] == OK


def test_a_part_runs_natively_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = (
        "import os, triton_optim, lab; "
        "print(os.getcwd(), triton_optim.__file__, lab.__file__, 'TRITON_INTERPRET' in os.environ)"
    )
    records = _report(tmp_path, _part("a", code))
    files = f"{ROOT / 'triton_optim/__init__.py'} {ROOT / 'perf/lab/__init__.py'}"
    assert records["a"]["detail"] == f"{ROOT} {files} False"


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "README.md").mkdir()
    with pytest.raises(IsADirectoryError):
        _report(tmp_path, _part("a", ""), _part("b", f"open({str(ran)!r}, 'w')"))
    assert ran.exists()


def test_what_is_missing_is_skipped_with_a_line(tmp_path: Path) -> None:
    needs = ("pytest", "no_such_module", "no-such-program")
    records = _report(tmp_path, _part("a", "", needs=needs), _part("b", "", needs=("sh",)))
    assert (records["a"]["outcome"], records["b"]["outcome"]) == (SKIPPED, OK)
    line = "| a | skipped | | DATE | | no_such_module, no-such-program not found |"
    assert line.replace("DATE", records["a"]["date"]) in _page(tmp_path)


def test_a_folder_of_another_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(machine: str) -> bool:
        code = f"print('GPU: {machine}\\nmachine: {machine}')"
        monkeypatch.setattr(gpu_report, "MACHINE", _part("machine", code))
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
