"""Parts of `perf/gpu_report.py` that fail, run out of time, are missing, and go on."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_step
import gpu_report
import pytest
from fake_device import FakeDevice
from gpu_report import report
from lab import parts
from lab.parts import FAILED, OK, OUT_OF_TIME, SKIPPED, Part, Record

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
    records = _report(tmp_path, _part("slow", code, 8 * SECONDS))
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
