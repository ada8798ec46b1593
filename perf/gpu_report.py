"""Says what the package does on this GPU, in one page: README.md of a folder. Needs a GPU.

    python perf/gpu_report.py
    python perf/gpu_report.py --minutes 150 --out perf/results/h100

Runs from a checkout, with torch, Triton and pytest and nothing installed. Ten minutes give the
tests of the GPU, and a step beside torch's on a layout of every suite. Later calls with the same
folder go on from there: what is done is not done again; what ran out of time or failed is tried
once more, after all that was never begun. `--parts` names what to run, also where it is done.

Every part is a process of its own with a time limit. None that fails ends the report.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from lab import page
from lab.machine import NO_GPU
from lab.parts import LEAST, OK, Part, Record, State, limit, run
from lab.rules import FORMATS
from lab.suites import SUITES

PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors")
GPU_TESTS = ("tests/test_gpu.py", "tests/test_gpu_graphs.py")
STEP = ("perf/bench_step.py", "--minutes", "{minutes}", "--out", "{raw}")
FORMAT_NAMES = [storage.name for storage in FORMATS]

MACHINE = Part("machine", ("-m", "lab.machine"), 2)
PARTS = (
    Part("self-check", ("-m", "triton_optim"), 3, first=True),
    Part("gpu-tests", (*PYTEST, *GPU_TESTS, "-k", "not compute_sanitizer"), 5, first=True,
         needs=("pytest",)),
    Part("sanitizer", (*PYTEST, GPU_TESTS[0], "-k", "compute_sanitizer"), 3, first=True,
         needs=("pytest", "compute-sanitizer")),
    Part("step-short", (*STEP, "--short"), 10, first=True),
    Part("tests", PYTEST, 20, needs=("pytest",)),
    Part("step-formats", (*STEP, "--suite", "gpt2", "--storages", *FORMAT_NAMES), 4),
    *(Part(f"step-{suite}", (*STEP, "--suite", suite), 9) for suite in SUITES),
    Part("host", ("perf/bench_host.py", "--out", "{raw}/host.csv"), 8, needs=("matplotlib",)),
    Part("tune", ("perf/tune.py", "--minutes", "{minutes}", "--out", "{raw}"), 9),
    Part("profile", ("perf/profile_step.py", "--trace", "{raw}/profile_step.json.gz"), 2,
         needs=("matplotlib", "tqdm")),
)  # fmt: skip
PLOTS = "plots"  # drawn anew after every part whose name begins with `step-`


def report(
    parts: Sequence[Part], folder: Path, end: float, chosen: Sequence[str] | None = None
) -> None:
    """Run what is to do, and write the page after every part.

    Args:
        parts: in their order.
        folder: of the page, the state and, in `raw`, the logs and CSV files.
        end: the `time.monotonic()` at which the last one is killed.
        chosen: the parts to run, also those that are done; without it, all that are not.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    state = State(folder / "state.json")
    names = [MACHINE.name, *(part.name for part in parts), PLOTS]
    to_do = state.to_do(parts)
    if chosen is not None:
        to_do = [part for part in parts if part.name in chosen]
    try:
        while to_do:
            part = to_do.pop(0)
            left = end - time.monotonic()
            if left < min(LEAST, 60 * part.minutes):
                print(f"the minutes are over before {part.name}; another call goes on there")
                break
            _put(state, part.name, run(part, raw, limit(part, to_do, left)))
            if part.name.startswith("step-") and any(raw.glob("step-*.csv")):
                _put(state, PLOTS, _draw(raw))
            try:
                page.write(folder, names, state.records)
            except Exception:  # parts that can still run are worth more than this page
                traceback.print_exc()
    finally:  # also when something ends this program
        page.write(folder, names, state.records)
        print(f"wrote {folder / 'README.md'}")


def _put(state: State, name: str, record: Record) -> None:
    state.put(name, record)
    print(f"{name:<16}{record.outcome:<12}{record.seconds:>6.0f} s  {record.detail}", flush=True)


def _draw(raw: Path) -> Record:
    files = (f"{{raw}}/{path.name}" for path in sorted(raw.glob("step-*.csv")))
    command = ("perf/plot.py", *files, "--folder", "{raw}")
    return run(Part(PLOTS, command, 1, needs=("matplotlib",)), raw, 60)


def is_here(folder: Path) -> bool:
    """Whether there is a GPU, and the folder has nothing of another machine."""
    state = State(folder / "state.json")
    known = state.records.get(MACHINE.name)
    with tempfile.TemporaryDirectory() as fresh:
        record = run(MACHINE, Path(fresh), 60 * MACHINE.minutes)
        if record.detail.endswith(NO_GPU):
            print("gpu_report.py reports on a GPU, and torch sees none here.", file=sys.stderr)
            return False
        if known and known.outcome == record.outcome == OK and known.detail != record.detail:
            message = f"{folder} is of {known.detail}; here is {record.detail}: name another --out"
            print(message, file=sys.stderr)
            return False
        (folder / "raw").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(fresh) / f"{MACHINE.name}.log", folder / "raw")
    _put(state, MACHINE.name, record)
    return True


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of this call")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, help="only these, done or not")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not is_here(args.out):
        return 2
    report(PARTS, args.out, end, args.parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
