"""What the kernels that update by rows take and do on four GPUs, and what they move, without one.

    python perf/audit_rows.py [--arch sm_80 sm_90 sm_100 gfx942] [--json FILE]

compiles the kernels of sparse gradients, row-wise Adagrad and RMSprop's lazy rows, steps them in
Triton's interpreter, prints a row for each, and exits 1 if one breaks a limit: see `findings` and
`step_findings` in lab/row_report.py. The committed rows are written by

    python perf/audit_rows.py --json perf/results/audit-rows.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from lab import disassembly
from lab.disassembly import Usage, amdgcn, amdgcn_usage, sass, sass_usage
from lab.gpus import GPUS
from lab.machine_code import Instruction
from lab.row_code import Loop, adjacent, main_loop, row_accesses
from lab.row_kernels import KEYS_WARPS, Kernel, compiled, config, kernels
from lab.row_report import (
    Row,
    as_json,
    findings,
    print_kernels,
    print_steps,
    step_findings,
)
from lab.row_traffic import Step

from triton_optim.launch import row_launcher

WORKERS = 2
BATCH = 12  # kernels that are disassembled together
VECTOR_BITS = 128
STEPPED = "sm_90"  # whose block sizes the interpreted steps have


def main() -> int:
    """Print the rows and what is wrong with them; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=[*GPUS])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="each N-th kernel and step, but every kernel of sm_90",
    )
    args = parser.parse_args()
    rows, steps = audit(args.arch, args.every)
    print_kernels(rows)
    print_steps(steps)
    found = [finding for row in rows for finding in findings(row)]
    found += [finding for step in steps for finding in step_findings(step)]
    print(f"\n{len(rows)} kernels, {len(steps)} steps, {len(found)} findings")
    print("".join(f"- {finding}\n" for finding in found), end="")
    if args.json:
        args.json.write_text(as_json(triton.__version__, rows, steps))
    return 1 if found else 0


def audit(architectures: Sequence[str], every: int = 1) -> tuple[list[Row], list[Step]]:
    """The kernels by architecture and name, and the steps."""
    listed = kernels()
    with (
        ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool,
        ThreadPoolExecutor(WORKERS) as threads,
    ):
        tasks = []
        for architecture in architectures:
            chosen = listed if architecture == "sm_90" else listed[::every]
            for i in range(0, len(chosen), BATCH):
                tasks.append(pool.submit(examine, architecture, chosen[i : i + BATCH]))
        rows = sorted(row for task in tasks for row in task.result())
        parts = [(i * every, WORKERS * every) for i in range(WORKERS)]
        steps = [step for part in threads.map(_interpret, parts) for step in part]
    return rows, sorted(steps)


def _interpret(part: tuple[int, int]) -> Iterator[Step]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lab.row_traffic", STEPPED, "--part", *map(str, part)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return (Step(**item) for item in json.loads(done.stdout))


def examine(architecture: str, chosen: Sequence[Kernel]) -> list[Row]:
    """Compile kernels and read their machine code. Not in a process where Triton interprets."""
    binaries = [compiled(architecture, kernel) for kernel in chosen]
    if architecture.startswith("gfx"):
        texts = [binary.asm["amdgcn"] for binary in binaries]
        codes, usages = [*map(amdgcn, texts)], [*map(amdgcn_usage, texts)]
    else:
        cubins = [binary.asm["cubin"] for binary in binaries]
        texts = [binary.asm["ptx"] for binary in binaries]
        # The result of F2I.F64 is one register, which lab/disassembly.py takes for two.
        parse = disassembly.parse_sass
        with patch.object(
            disassembly, "parse_sass", lambda listing: parse(listing.replace("F2I.F64", "F2I"))
        ):
            codes = sass(cubins, architecture)
        usages = [*map(sass_usage, cubins)]
    return [*map(partial(_row, architecture), chosen, binaries, texts, codes, usages)]


def _row(
    architecture: str,
    kernel: Kernel,
    binary: Any,
    text: str,
    code: Sequence[Instruction],
    usage: Usage,
) -> Row:
    gpu, variant, shared = GPUS[architecture], kernel.variant, binary.metadata.shared
    if variant is None:
        block_rows, warps, multiple = row_launcher.KEYS_BLOCK, KEYS_WARPS, 1
        shape, loop = str(block_rows), Loop(0, 0)
    else:
        block_rows, warps = config(architecture, variant)
        shape, multiple = f"{block_rows}x{variant.columns}", variant.multiple
        try:
            loop = main_loop(code)
        except ValueError as error:
            raise ValueError(f"{architecture} {kernel.name}: {error}") from error
    accesses = row_accesses(binary.asm["ttgir"], text, shape)
    widths = [
        (access.stores, bits, min(VECTOR_BITS, multiple * access.element_bits))
        for access in accesses
        for bits in access.bits
    ]
    programs = gpu.resident_warps(warps, usage.registers, shared) // warps
    return Row(
        architecture,
        kernel.name,
        block_rows,
        warps,
        multiple,
        registers=usage.registers,
        spills=usage.spills,
        shared=shared,
        load_bits=max(bits for stores, bits, _ in widths if not stores),
        store_bits=max(bits for stores, bits, _ in widths if stores),
        accesses=len(widths),
        split=sum(bits < whole for _, bits, whole in widths),
        adjacent=1 if variant is None else adjacent(binary.asm["ttgir"], shape),
        instructions=len(code),
        loop=loop.instructions,
        resident_programs=programs,
        in_flight=programs * warps * gpu.warp_size * loop.outstanding,
    )


if __name__ == "__main__":
    sys.exit(main())
