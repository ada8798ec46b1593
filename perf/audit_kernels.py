"""What compiled kernels take, do and are limited by on four GPUs, found without one.

    python perf/audit_kernels.py [--arch sm_80 sm_90 sm_100 gfx942] [--json FILE]

compiles every kernel that the optimizers can launch, dense ones, those of four optimizers with
other formats of storage, and those that update by rows, and steps them in Triton's interpreter. It
prints a row for each, and exits 1 if one of them breaks a limit: see `findings` in lab/audit.py.
The committed rows are written by

    python perf/audit_kernels.py --json perf/results/audit.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from lab import interpreted_rows
from lab.audit import Audit, Measures
from lab.dense_kernels import Kernel
from lab.disassembly import disassembled
from lab.gpus import GPUS
from lab.interpreted import FORMATTED, formats_of, kernels_of
from lab.row_kernels import row_kernels

import triton_optim
from triton_optim.launch import tuning
from triton_optim.testing.interpreter import speed_up

WORKERS = 2
BATCH = 12  # kernels that are disassembled together
DENSE, FORMATS, ROWS = KINDS = ("dense", "formats", "rows")


def main() -> int:
    """Print the rows and what is wrong with them; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=[*GPUS])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    every = "each N-th kernel and step"
    parser.add_argument("--every", type=int, default=1, metavar="N", help=every)
    args = parser.parse_args()
    audited = audit(args.arch, args.kinds, args.every)
    audited.print()
    found = audited.findings()
    kernels = sum(len(of) for kind in audited[1:3] for of in kind.values())
    print(f"\n{kernels} kernels, {len(audited.row_steps)} steps by rows, {len(found)} findings")
    print("".join(f"- {finding}\n" for finding in found), end="")
    if args.json:
        args.json.write_text(audited.as_json())
    return 1 if found else 0


def audit(architectures: Sequence[str], kinds: Sequence[str] = KINDS, every: int = 1) -> Audit:
    dense: dict[str, list[Kernel]] = {}
    steps = []
    with _workers(interpret=True) as pool:
        if ROWS in kinds:
            cases = interpreted_rows.cases()[::every]
            steps = [pool.submit(interpreted_rows.measure, *case) for case in cases]
        dense = _dense(pool, architectures, kinds, every)
    by_rows = dict.fromkeys(architectures, row_kernels()[::every]) if ROWS in kinds else {}
    with _workers(interpret=False) as pool:
        tasks = [_examined(pool, dense), _examined(pool, by_rows)]
        kernels, rows = (
            {a: dict(sorted(chain(*(task.result() for task in of)))) for a, of in kind.items()}
            for kind in tasks
        )
    return Audit(triton.__version__, kernels, rows, dict(sorted(step.result() for step in steps)))


def _examined(
    pool: ProcessPoolExecutor, kernels: Mapping[str, Sequence[Any]]
) -> dict[str, list[Future[list[tuple[str, Measures]]]]]:
    return {
        a: [pool.submit(examine, a, of[i : i + BATCH]) for i in range(0, len(of), BATCH)]
        for a, of in sorted(kernels.items())
    }


@contextmanager
def _workers(*, interpret: bool) -> Iterator[ProcessPoolExecutor]:
    """Processes in which Triton interprets kernels or compiles them: it decides once."""
    with (
        patch.dict(os.environ, {"TRITON_INTERPRET": str(int(interpret))}),
        ProcessPoolExecutor(WORKERS, get_context("spawn"), speed_up if interpret else None) as pool,
    ):
        yield pool


def _dense(
    pool: ProcessPoolExecutor, architectures: Sequence[str], kinds: Sequence[str], every: int
) -> dict[str, list[Kernel]]:
    """The dense kernels of each architecture: of dtypes of torch, and of other formats."""
    # Where launches are cut alike, steps move the same.
    cuts = {a: tuple(tuning.config(a, half=half).chunk for half in (False, True)) for a in GPUS}
    first = {cuts[a]: a for a in reversed(architectures)}
    # Adam for AdamW too, whose rule is the same.
    optimizers = [*triton_optim.OPTIMIZERS, "Lion"]
    names = {getattr(triton_optim, n).rule.name: n for n in reversed(optimizers)}.values()
    asked = [(kernels_of, name) for name in names if DENSE in kinds]
    asked += [(formats_of, name) for name in FORMATTED if FORMATS in kinds]
    tasks = {a: [pool.submit(of, a, name, every) for of, name in asked] for a in first.values()}
    found = {a: [kernel for task in of for kernel in task.result()] for a, of in tasks.items()}
    return {a: [k for k in found[first[cuts[a]]] if k.is_followed(a)] for a in architectures}


def examine(architecture: str, kernels: Sequence[Any]) -> list[tuple[str, Measures]]:
    """Compile kernels and read their machine code. Not in a process where Triton interprets."""
    binaries = [kernel.compiled(architecture) for kernel in kernels]
    measured = []
    for kernel, binary, code in zip(
        kernels, binaries, disassembled(architecture, binaries), strict=True
    ):
        try:
            measured.append((kernel.name, kernel.measures(architecture, binary, *code)))
        except ValueError as error:
            raise ValueError(f"{architecture} {kernel.name}: {error}") from error
    return measured


if __name__ == "__main__":
    sys.exit(main())
