"""Times a step of every optimizer beside torch's and other packages'.

    python perf/bench_step.py --suite gpt2
    python perf/bench_step.py --suite sweep llama3-8b --rules adagrad rmsprop --minutes 9
    python perf/bench_step.py --short
    python perf/bench_step.py --suite embeddings-tiny --check

An implementation is first checked against torch's for-loop in float64; one that fails prints no
time. Rows go to a CSV file in perf/results as they come. README.md says what each column means.

It needs a GPU. Without one, suites of embeddings time torch and FBGEMM on the CPU, and our step's
host time, with launches that do nothing: our kernels would run in Triton's interpreter, as those of
`--check` do, which only checks.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Read when triton_optim imports Triton.
    os.environ["TRITON_INTERPRET"] = "1" if "--check" in sys.argv else "0"

from lab.bench import bench, count_launches
from lab.device import Device, Host
from lab.dry_embeddings import dry_rows
from lab.embedding_steps import EMBEDDING_IMPLEMENTATIONS
from lab.embedding_tables import EMBEDDING_SUITES, Tables
from lab.group import Group, groups_of
from lab.implementations import IMPLEMENTATIONS, Implementation
from lab.machine import package_version, processor_and_threads
from lab.report import print_goals, print_group, print_launches, print_missing
from lab.rows import FAILED, OURS, WRONG, Row, Table
from lab.rules import ALL_STORAGES, EMBEDDING_RULES, RULES, STORAGES
from lab.suites import SMALL_TENSORS, SUITES, Layout

RESULTS = Path(__file__).parent / "results"
COUNTING = 0.2  # share of a run's time that counting launches may take
CPU_GIB = 8.0
IMPLEMENTED = {item.name for item in (*IMPLEMENTATIONS, *EMBEDDING_IMPLEMENTATIONS)}


def typical(suite: str) -> Layout | Tables:
    """The layout that `--short` takes of a suite: many small tensors, or the one of middle size."""
    layouts = sorted(SUITES[suite](), key=lambda layout: layout.params)
    small = [layout for layout in layouts if layout.name == SMALL_TENSORS]
    return small[0] if small else layouts[len(layouts) // 2]


def groups(args: argparse.Namespace) -> list[Group]:
    """All that was asked for; float32 of everything comes first."""
    found = [
        group
        for suite in args.suite
        for layout in ([typical(suite)] if args.short else SUITES[suite]())
        if not args.layouts or layout.name in args.layouts
        for group in groups_of(suite, layout)
        if group.rule.name in args.rules and group.storage.name in args.storages
    ]
    return sorted(found, key=lambda group: [*ALL_STORAGES].index(group.storage.name))


def chosen(group: Group, names: Sequence[str] | None) -> list[Implementation]:
    """Who steps a group: ours, and those of these names, or all."""
    items: Sequence[Implementation] = group.workload.implementations
    return [item for item in items if names is None or item.name in (OURS, *names)]


def run(device: Device, args: argparse.Namespace, results: Path) -> Table:
    """Measure all groups in turn, as far as the time allows, into a CSV file."""
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    timed_until = begin + 60 * args.minutes * (1 - COUNTING)
    now = datetime.now(timezone.utc)
    base = Row(
        date=now.isoformat(timespec="seconds"),
        machine=processor_and_threads(),
        gpu=device.name,
        driver=device.driver(),
        torch=torch.__version__,
        triton=package_version("triton") or "",
        cold=args.cold,
    )
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    name = f"step-{'+'.join(args.suite)}-{slug}-{now:%Y%m%d-%H%M%S}.csv"
    table = Table(results / name)
    print(f"{base.machine}; GPU: {base.gpu}; torch {base.torch}, Triton {base.triton}")
    done: list[tuple[Group, list[Row]]] = []
    table.add()
    left = groups(args)
    while left and time.monotonic() < timed_until:
        group = left.pop(0)
        rows = bench(device, group, base, args.repeats, timed_until, only_check=args.check,
                     implementations=chosen(group, args.implementations))  # fmt: skip
        table.add(rows)
        print_group(rows)
        done.append((group, rows))
    if not (left or device.is_gpu or args.check):
        for rows in dry_rows(base, args.rules):
            table.add(rows)
            print_group(rows)
    try:  # last, because a profiler that has run once slows all later launches
        count_launches(device, done, end)
    except Exception as error:
        print(f"\nlaunches could not be counted: {error}")
    table.add()
    print_launches(table.rows)
    print_missing(table.rows)
    if left:
        print(f"\nthe time was up before {len(left)} groups, the first of them {left[0].name}")
    print_goals(table.rows)
    if not args.check or args.out:
        print(f"wrote {table.path}")
    return table


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: sweep")
    names = [*dict.fromkeys(rule.name for rule in (*RULES, *EMBEDDING_RULES))]
    parser.add_argument("--rules", nargs="+", choices=names, default=names)
    parser.add_argument("--storages", nargs="+", choices=ALL_STORAGES)
    parser.add_argument("--layouts", nargs="+", help="of the suites, by name")
    parser.add_argument("--implementations", nargs="+", help="beside ours, by name")
    short = "a layout a suite, by default of all suites, the smallest first, in float32"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--check", action="store_true", help="only check, and time nothing")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    minutes = 9.0 if on_gpu else 3.0
    parser.add_argument("--minutes", type=float, default=minutes, help="of the whole run")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5, help="two at least")
    parser.add_argument("--memory", type=float, default=CPU_GIB, help="GiB, without a GPU")
    parser.add_argument("--cold", action="store_true", help="compile everything anew")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: a spread needs two at least")
    if args.short:
        args.suite = args.suite or sorted(SUITES, key=lambda suite: typical(suite).params)
        args.storages = args.storages or [STORAGES[0].name]
    args.suite = args.suite or ["sweep"]
    args.storages = args.storages or [storage.name for storage in STORAGES]
    for option, known in (("layouts", _layouts(args.suite)), ("implementations", IMPLEMENTED)):
        if unknown := {*(getattr(args, option) or ())} - known:
            parser.error(f"--{option} {min(unknown)}: there is {', '.join(sorted(known))}")
    return args


def _layouts(suites: Sequence[str]) -> set[str]:
    return {layout.name for suite in suites for layout in SUITES[suite]()}


def main() -> int:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or args.check or {*args.suite} <= EMBEDDING_SUITES.keys()):
        print("bench_step.py times a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, but without a warning
    if not on_gpu:
        torch.set_num_threads(1)  # others on the machine disturb several threads much more
    with tempfile.TemporaryDirectory() as folder:
        if args.cold:
            os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        device = Device() if on_gpu else Host(int(args.memory * (1 << 30)))
        table = run(device, args, args.out or (Path(folder) if args.check else RESULTS))
    ours = {row.status for row in table.rows if row.implementation == OURS}
    return 1 if ours & {FAILED, WRONG} else 0


if __name__ == "__main__":
    sys.exit(main())
