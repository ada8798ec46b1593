"""Times a step of embedding tables with sparse gradients, beside torch's and FBGEMM's.

    python perf/bench_sparse.py --rows 1000000 10000000 --dim 64 128 --rules adagrad
    python perf/bench_sparse.py --tables 26 --rows 1000000 --batch 4096
    python perf/bench_sparse.py --check

Gradients are uncoalesced, as `nn.Embedding(sparse=True)` makes them. An implementation is first
checked against torch's optimizer in float64; one that fails prints no time. Without a GPU our
kernels have no time either: they would run in Triton's interpreter, or torch's own way. What is
timed there is torch and FBGEMM on the CPU, and our step's host time, with launches that do nothing.
`--check` only checks; without a GPU it runs the kernels in the interpreter. README.md says what
each column means.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Read when triton_optim imports Triton.
    os.environ["TRITON_INTERPRET"] = "1" if "--check" in sys.argv else "0"

from lab.device import Device
from lab.implementations import COPY, OURS, package_version
from lab.machine import processor_and_threads
from lab.rows import FAILED, NO_ROOM, OK, WRONG
from lab.sparse_group import Group
from lab.sparse_host import DRY_TABLES, GIB, Host, dry_shape, dry_times
from lab.sparse_implementations import RULES
from lab.sparse_rows import Row, append, print_goals, print_rows
from lab.sparse_work import DISTRIBUTIONS, Shape
from lab.timing import Summary

# rows, dim, batch
ON_GPU = ((10**5, 10**7, 10**8), (16, 128, 512), (10**3, 10**4, 10**5, 10**6))
ON_CPU = ((10**5, 10**6), (16, 64), (10**3, 10**5))
ONLY_CHECKED = ((1000,), (16, 100), (2000,))
CPU_GIB = 8.0


def shapes(args: argparse.Namespace) -> list[Shape]:
    sizes = product(args.rows, args.dim, args.batch, args.distributions)
    return [Shape(*size, args.tables) for size in sizes]


def run(device: Device, args: argparse.Namespace) -> list[Row]:
    """Measure all shapes in turn, as far as the time allows."""
    stop = time.monotonic() + 60 * args.minutes
    base = Row(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=processor_and_threads(),
        gpu=device.name,
        driver=device.driver(),
        torch=torch.__version__,
        triton=package_version("triton") or "",
    )
    print(f"{base.machine}; GPU: {base.gpu}; torch {base.torch}, Triton {base.triton}")
    rows: list[Row] = []
    left = shapes(args)
    while left and time.monotonic() < stop:
        shape = left.pop(0)
        group = Group(device, shape, args.rules, args.check)
        found = group.bench(base, args.repeats, stop)
        unique = f", {found[0].unique_rows:,} rows touched" if found[0].unique_rows else ""
        rows += _kept(f"{shape}{unique}", found, args.out)
    if left:
        print(f"\nthe time was up before {len(left)} shapes, the first of them {left[0]}")
    elif isinstance(device, Host) and not args.check:
        for tables in DRY_TABLES:
            rows += _kept(*_dry(base, tables, args.rules), args.out)
    _print_missing(rows)
    print_goals(rows)
    return rows


def _kept(title: str, rows: list[Row], out: Path | None) -> list[Row]:
    print_rows(title, rows)
    if out is not None:
        append(out, rows)
    return rows


def _dry(base: Row, tables: int, rules: Sequence[str]) -> tuple[str, list[Row]]:
    """Our host time without a GPU, beside torch's."""
    shape = dry_shape(tables)
    base = replace(base, **shape._asdict(), gpu="none, compiled for sm_90", status=OK)
    rows = []
    for item, found in dry_times(shape, rules):
        row = replace(base, rule=item.rule.name, implementation=item.name)
        row.version = item.version() or ""
        if isinstance(found, Summary):
            row.host_us, row.host_us_p20, row.host_us_p80 = found
        else:
            row.status, row.detail = FAILED, found
        rows.append(row)
    return f"host time, launches do nothing: {shape}", rows


def _print_missing(rows: Sequence[Row]) -> None:
    missing = [row for row in rows if row.status == NO_ROOM and row.implementation != COPY]
    if missing:
        print("\ndid not fit the memory:")
    for row in missing:
        tables = f"{row.tables} x {row.rows:,} x {row.dim}, {row.batch:,} ids {row.distribution}"
        print(f"  {tables}: {row.rule}, {row.implementation}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--rows", type=int, nargs="+", help="of a table")
    parser.add_argument("--dim", type=int, nargs="+", help="columns of a table")
    parser.add_argument("--batch", type=int, nargs="+", help="ids a table")
    parser.add_argument("--tables", type=int, default=1, help="all alike, in one optimizer")
    kinds = [*DISTRIBUTIONS]
    parser.add_argument("--distributions", nargs="+", choices=kinds, default=kinds)
    names = [rule.name for rule in RULES]
    parser.add_argument("--rules", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=9.0 if on_gpu else 3.0)
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5, help="two at least")
    parser.add_argument("--memory", type=float, default=CPU_GIB, help="GiB, without a GPU")
    parser.add_argument("--check", action="store_true", help="check small tables, time nothing")
    parser.add_argument("--out", type=Path, help="CSV file to which rows are added")
    args = parser.parse_args(argv)
    sizes = ONLY_CHECKED if args.check else ON_GPU if on_gpu else ON_CPU
    for name, default in zip(("rows", "dim", "batch"), sizes, strict=True):
        setattr(args, name, getattr(args, name) or default)
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: a spread needs two at least")
    return args


def main() -> int:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, but without a warning
    if not on_gpu:
        torch.set_num_threads(1)  # others on the machine disturb several threads much more
    rows = run(Device() if on_gpu else Host(int(args.memory * GIB)), args)
    ours = {row.status for row in rows if row.implementation == OURS}
    return 1 if FAILED in ours or any(row.status == WRONG for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
