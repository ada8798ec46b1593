"""Host time of `step()` beside torch's, and beside only reading the addresses of gradients.

    python perf/bench_host.py

Every implementation steps the same small tensors in turn in one run: medians, 20th and 80th
percentile. Without a GPU our kernels are compiled for sm_90, bound and handed to a launcher that
does nothing (lab/dry_gpu.py); torch's steps run on the CPU, and their times hold its arithmetic on
32 elements a tensor. perf/README.md says what that compares, and what the columns mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby, product
from pathlib import Path

import plot
import torch
from lab import machine
from lab.dry_gpu import dry_gpu
from lab.host_rows import FLOOR, GRADIENTS, PARAMS, SERIES, TORCH, Row, write
from lab.host_steps import RULES, Case, cold_rows, launch_rows, measure
from lab.host_tensors import one_process
from lab.rows import OURS
from lab.timing import FEWEST_REPEATS

COUNTS = (10, 100, 300, 1000, 20_000)
MANY = 1000  # more tensors than these are stepped by MANY_RULE alone, unless --rules names others
MANY_RULE = "rmsprop"


def main() -> None:
    """Measure, print, and write a CSV and a plot."""
    args = _arguments()
    rules = args.rules or [*RULES]
    torch.set_num_threads(1)
    print(f"{machine.in_one_line()}; microseconds a step: median (20th to 80th percentile)\n")
    heads = (FLOOR, OURS, "", *(f"torch {name}" for name in TORCH))
    print(f"{'':<46}" + "".join(f"{head:>22}" for head in heads))
    rows: list[Row] = []
    with nullcontext() if torch.cuda.is_available() else dry_gpu(), one_process():
        for case in _cases(args):
            measured = measure(case, args.repeats, args.seconds)
            for _, of_groups in groupby(measured, key=lambda row: row.groups):
                _print([*of_groups])
            rows += measured
            if args.out:  # now, for something may end this run
                write(args.out.with_suffix(".csv"), rows)
        launches = launch_rows(rules[0])
    for row in launches:
        print(f"{row.implementation}: {row.median:.1f} ({row.p20:.1f}-{row.p80:.1f}) us")
    cold = cold_rows(rules)
    print("first steps of a process, Triton's cache empty, one rule after another, of DTensors:")
    for name, of_one in groupby(cold, key=lambda row: row.implementation):
        seconds = ", ".join(f"{row.rule} {row.median / 1e6:.2f} s" for row in of_one)
        print(f"  {name}: {seconds}")
    if args.out:
        rows += [*launches, *cold]
        write(args.out.with_suffix(".csv"), rows)
        plot.draw_hosts(rows, args.out.with_suffix(".png"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--rules", nargs="+", choices=RULES)
    parser.add_argument("--params", nargs="+", choices=PARAMS, default=PARAMS)
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=GRADIENTS)
    parser.add_argument("--repeats", type=int, default=30, help=f"at least {FEWEST_REPEATS}")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of a case: no repeat begins after"
    )
    parser.add_argument("--out", type=Path, help="FILE.csv; the plot is FILE.png")
    return parser.parse_args()


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for case in product(args.rules or RULES, args.tensors, args.params, args.gradients):
        rule, tensors, *_ = case
        if args.rules or rule == MANY_RULE or tensors <= MANY:
            yield Case(*case)


def _print(rows: Sequence[Row]) -> None:
    by_name, first = {row.implementation: row for row in rows}, rows[0]
    cells = [f"{row.median:.0f} ({row.p20:.0f}-{row.p80:.0f})" if row else "none"
             for row in map(by_name.get, SERIES)]  # fmt: skip
    cells.insert(2, f"= {by_name[OURS].median / by_name[FLOOR].median:.1f} x floor")
    what = f"{first.tensors:>6} {first.params:<8}in {first.groups:>2}, {first.gradients:<10}"
    print(f"{first.rule:<13}{what}  " + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
