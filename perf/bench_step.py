"""Times a step of every optimizer beside torch's and other packages'. Needs a GPU.

    python perf/bench_step.py --suite gpt2
    python perf/bench_step.py --suite sweep llama3-8b --rules adagrad rmsprop --minutes 9
    python perf/bench_step.py --short

An implementation is first checked against torch's for-loop in float64; one that fails prints no
time. Rows go to a CSV file in perf/results as they come. README.md says what each column means.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from lab.device import Device
from lab.group import Group, bench, count_launches
from lab.implementations import RULES, STORAGES, package_version
from lab.report import print_goals, print_group, print_launches
from lab.rows import Row, Table
from lab.suites import SMALL_TENSORS, SUITES, Layout

RESULTS = Path(__file__).parent / "results"
COUNTING = 0.2  # share of a run's time that counting launches may take


def typical(suite: str) -> Layout:
    """The layout that `--short` takes of a suite: many small tensors, or the one of middle size."""
    layouts = sorted(SUITES[suite](), key=lambda layout: layout.params)
    small = [layout for layout in layouts if layout.name == SMALL_TENSORS]
    return small[0] if small else layouts[len(layouts) // 2]


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """All that was asked for; float32 of everything comes first."""
    for storage in STORAGES:
        for suite in args.suite:
            for layout in [typical(suite)] if args.short else SUITES[suite]():
                for rule in RULES:
                    if not rule.states and storage.param != storage.state:
                        continue  # without state, two storages are one
                    if rule.name in args.rules and storage.name in args.storages:
                        yield Group(suite, layout, rule, storage)


def run(device: Device, args: argparse.Namespace, results: Path) -> Path:
    """Measure all groups in turn, as far as the time allows; returns the CSV file."""
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    timed_until = begin + 60 * args.minutes * (1 - COUNTING)
    now = datetime.now(timezone.utc)
    base = Row(
        date=now.isoformat(timespec="seconds"),
        gpu=device.name,
        driver=device.driver(),
        torch=torch.__version__,
        triton=package_version("triton") or "",
        cold=args.cold,
    )
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    name = f"step-{'+'.join(args.suite)}-{slug}-{now:%Y%m%d-%H%M%S}.csv"
    table = Table(results / name)
    done: list[tuple[Group, list[Row]]] = []
    left = list(groups(args))
    while left and time.monotonic() < timed_until:
        group = left.pop(0)
        rows = bench(device, group, base, args.repeats, timed_until)
        table.add(rows)
        print_group(rows)
        done.append((group, rows))
    try:  # last, because a profiler that has run once slows all later launches
        count_launches(device, done, end)
    except Exception as error:
        print(f"\nlaunches could not be counted: {error}")
    table.rewrite()
    print_launches(table.rows)
    if left:
        first = f"{left[0].layout.name}, {left[0].rule.name}, {left[0].storage.name}"
        print(f"\nthe time was up before {len(left)} groups, the first of them {first}")
    print_goals(table.rows)
    print(f"wrote {table.path}")
    return table.path


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: sweep")
    names = [rule.name for rule in RULES]
    parser.add_argument("--rules", nargs="+", choices=names, default=names)
    storages = [storage.name for storage in STORAGES]
    parser.add_argument("--storages", nargs="+", choices=storages)
    short = "a layout a suite, by default of all suites, the smallest first, in float32"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run")
    parser.add_argument("--repeats", type=int, default=20, help="two at least")
    parser.add_argument("--cold", action="store_true", help="compile everything anew")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: a spread needs two at least")
    if args.short:
        args.suite = args.suite or sorted(SUITES, key=lambda suite: typical(suite).params)
        args.storages = args.storages or [STORAGES[0].name]
    args.suite, args.storages = args.suite or ["sweep"], args.storages or storages
    return args


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("bench_step.py times a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if args.cold:
            os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        run(Device(), args, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
