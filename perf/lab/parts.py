"""Programs that run one after another, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

OK = "ok"
FAILED = "failed"
OUT_OF_TIME = "out of time"
SKIPPED = "skipped"

FLOOR = 60.0  # seconds that a part gets at least, where its own limit allows
LEAST = 20.0  # seconds: with less left than that, nothing is begun
GRACE = 10.0  # seconds from the interrupt at a part's limit until it is killed
OWN_SHARE = 0.95  # of its limit, that a program with a limit of its own is given
INCOMPLETE = "the time was up before"  # what bench_step.py prints then


class Part(NamedTuple):
    """A program.

    Attributes:
        name: of its log file, too.
        arguments: for the Python interpreter. In them `{minutes}` becomes the program's own
            limit, and `{raw}` the folder for its files.
        minutes: its limit, and its weight where there is not enough time for all.
        first: whether it comes before all time is shared with the others.
        needs: modules and programs without which it is skipped.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    first: bool = False
    needs: tuple[str, ...] = ()


@dataclass
class Record:
    """How a part ended."""

    outcome: str
    detail: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    date: str = ""


class State:
    """How all parts ended until now, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: dict[str, Record] = {}
        if path.exists():
            found = json.loads(path.read_text())
            self.records = {name: Record(**record) for name, record in found.items()}

    def put(self, name: str, record: Record) -> None:
        """Keep a record; it is on the disk when this returns."""
        self.records[name] = record
        text = json.dumps({name: asdict(record) for name, record in self.records.items()}, indent=1)
        new = self._path.with_suffix(".new")
        new.write_text(text + "\n")
        new.replace(self._path)

    def to_do(self, parts: Sequence[Part]) -> list[Part]:
        """What is not done, in the order in which to do it.

        What was never begun comes first, then what ran out of time, then what failed: it may fail
        again, and must not take the time of the others.
        """
        order = ("", SKIPPED, OUT_OF_TIME, FAILED)
        outcomes = {name: record.outcome for name, record in self.records.items()}
        left = [part for part in parts if outcomes.get(part.name) != OK]
        return sorted(left, key=lambda part: order.index(outcomes.get(part.name, "")))


def limit(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds for a part, when `left` are left for it and those that come later.

    Parts of the same kind, first or not, share what is left by their weights; the others wait.
    """
    weights = sum(other.minutes for other in (part, *later) if other.first == part.first)
    share = max(FLOOR, left * part.minutes / weights)
    return min(60 * part.minutes, share, left)


def run(part: Part, raw: Path, seconds: float) -> Record:
    """Run a part; what it prints goes to a log file as it comes."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    missing = [need for need in part.needs if find_spec(need) is None and not shutil.which(need)]
    if missing:
        return Record(SKIPPED, f"{', '.join(missing)} not found", date=date)
    # From the root, so that what is printed names no place of this machine.
    values = {"minutes": f"{OWN_SHARE * seconds / 60:.2f}", "raw": os.path.relpath(raw, ROOT)}
    arguments = [argument.format(**values) for argument in part.arguments]
    log = raw / f"{part.name}.log"
    begin = time.monotonic()
    code = _code([sys.executable, *arguments], log, seconds)
    printed = log.read_text(errors="replace")
    outcome, detail = OK, printed.rstrip().rpartition("\n")[2].strip()
    if code is None:
        outcome = OUT_OF_TIME
    elif code != 0:
        outcome, detail = FAILED, f"exit status {code}: {detail}"
    elif INCOMPLETE in printed:
        outcome = OUT_OF_TIME
    return Record(outcome, detail, round(time.monotonic() - begin, 1), round(seconds, 1), date)


def _code(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """The exit status, or None where the time was up; then no process of its group is left."""
    # For a bare checkout, natively on the GPU, and with output as it comes.
    paths = [str(ROOT), str(ROOT / "perf"), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd=ROOT, env={**kept, **more}, start_new_session=True,
        )  # fmt: skip
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGINT)  # pytest then says what failed so far
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
