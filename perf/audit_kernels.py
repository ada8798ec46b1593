"""What compiled kernels take, do and are limited by on four GPUs, found without one.

    python perf/audit_kernels.py [--arch sm_80 sm_90 sm_100 gfx942] [--json FILE]

compiles every kernel that the optimizers can launch, prints a row for each, and exits 1 if one of
them breaks a limit: see `findings` in lab/kernel_report.py. The committed rows are written by

    python perf/audit_kernels.py --json perf/results/audit.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from lab.disassembly import Usage, amdgcn, amdgcn_usage, sass, sass_usage
from lab.gpus import GPUS
from lab.interpreted import Step
from lab.kernel_report import Row, as_json, findings, print_table
from lab.machine_code import Code, Instruction, MainPath
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton_optim
from triton_optim.kernels import multi_tensor
from triton_optim.launch import backend, tuning
from triton_optim.rule import Rule

WORKERS = 2
BATCH = 12  # kernels that are disassembled together
# The kernel's run-time arguments as a GPU is given them.
ARGUMENTS = {
    "owners_ptr": "*i32",
    "rows_ptr": "*i64",
    "grads_ptr": "*i64",
    "hypers_ptr": "*fp64",
    "steps_ptr": "*fp64",
    "found_inf_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "grad_norm_ptr": "*fp64",
    "max_norm_ptr": "*fp64",
    "happened_ptr": "*fp32",
    "n_bytes": "fp32",
}


def main() -> int:
    """Print the rows and what is wrong with them; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=[*GPUS])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="each N-th kernel, but every one of sm_90"
    )
    args = parser.parse_args()
    rows = audit(args.arch, args.every)
    print_table(rows)
    found = [finding for row in rows for finding in findings(row)]
    print(f"\n{len(rows)} kernels, {len(found)} findings")
    print("".join(f"- {finding}\n" for finding in found), end="")
    if args.json:
        args.json.write_text(as_json(triton.__version__, rows))
    return 1 if found else 0


def audit(architectures: Sequence[str], every: int = 1) -> list[Row]:
    """A row a kernel, by architecture and name."""
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        tasks = []
        for architecture, steps in _steps(architectures).items():
            chosen = steps if architecture == "sm_90" else steps[::every]
            for i in range(0, len(chosen), BATCH):
                tasks.append(pool.submit(examine, architecture, chosen[i : i + BATCH]))
        return sorted(row for task in tasks for row in task.result())


def _steps(architectures: Sequence[str]) -> dict[str, list[Step]]:
    """The kernels of each architecture and what they move, from interpreted steps."""
    # Where launches are cut alike, steps move the same.
    cuts = {a: tuple(tuning.config(a, half=half).chunk for half in (False, True)) for a in GPUS}
    first = {cuts[a]: a for a in reversed(architectures)}
    tasks = [(a, name) for a in first.values() for name in triton_optim.OPTIMIZERS]
    steps: dict[str, list[Step]] = {a: [] for a in first.values()}
    with ThreadPoolExecutor(WORKERS) as pool:
        for (architecture, _), found in zip(tasks, pool.map(_interpret, tasks), strict=True):
            steps[architecture] += [*found, *(step.misaligned() for step in found)]
    return {a: steps[first[cuts[a]]] for a in architectures}


def _interpret(task: tuple[str, str]) -> list[Step]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lab.interpreted", *task]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return [Step.from_json(item) for item in json.loads(done.stdout)]


def examine(architecture: str, steps: Sequence[Step]) -> list[Row]:
    """Compile kernels and read their machine code. Not in a process where Triton interprets."""
    compiled = [_compile(architecture, step) for step in steps]
    if architecture.startswith("gfx"):
        texts = [kernel.asm["amdgcn"] for kernel in compiled]
        codes, usages = [amdgcn(text) for text in texts], [amdgcn_usage(text) for text in texts]
    else:
        cubins = [kernel.asm["cubin"] for kernel in compiled]
        codes, usages = sass(cubins, architecture), [sass_usage(cubin) for cubin in cubins]
    shared = [kernel.metadata.shared for kernel in compiled]
    return [_row(architecture, *item) for item in zip(steps, codes, usages, shared, strict=True)]


def _compile(architecture: str, step: Step) -> Any:
    """The kernel that `UpdateLaunch` would have compiled."""
    kernel = multi_tensor.multi_tensor_kernel
    config = tuning.config(architecture, half=step.variant.half)
    constants = backend.constants(
        Rule(getattr(backend.rules, step.rule)), step.variant, config, step.n_hypers
    )
    constants |= dict.fromkeys(backend.unused_pointers(step.variant))
    types = {name: ARGUMENTS[name] for name in kernel.arg_names if name not in constants}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in types if types[name][0] == "*"},
    )
    warp_size = GPUS[architecture].warp_size
    if architecture.startswith("gfx"):
        # Triton before 3.5 wants ROCm's linker; what is read here is the assembly before it.
        os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
        target = GPUTarget("hip", architecture, warp_size)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), warp_size)
    options = backend.options(step.variant, config, architecture)
    return triton.compile(source, target=target, options=options)


def _row(
    architecture: str, step: Step, code: Sequence[Instruction], usage: Usage, shared: int
) -> Row:
    gpu, variant = GPUS[architecture], step.variant
    config = tuning.config(architecture, half=variant.half)
    elements = config.chunk // (config.num_warps * gpu.warp_size)  # a thread
    sizes = backend.ITEM_SIZES
    written = sizes[variant.param_dtype] + variant.n_states * sizes[variant.state_dtype]
    written += sizes[variant.grad_dtype] if "UNSCALE" in variant.gate else 0
    try:
        path = Code(code).main_path(elements * written) or MainPath(0, 0, (), (), 0)
    except ValueError as error:
        raise ValueError(f"{architecture} {step.name}: {error}") from error
    if path.stores and sum(path.loads) < elements * (variant.bytes_per_element - written):
        raise ValueError(f"{architecture} {step.name}: not every load was found")
    warps = gpu.resident_warps(config.num_warps, usage.registers, shared)
    return Row(
        architecture,
        step.name,
        backend.ALIGNMENT if variant.aligned else min(sizes[dtype] for dtype in step.storage),
        registers=usage.registers,
        spills=usage.spills,
        shared=shared,
        load_bits=8 * max(path.loads, default=0),
        store_bits=8 * max(path.stores, default=0),
        narrowest_bits=8 * min(path.loads + path.stores, default=0),
        instructions=round(path.instructions / elements, 2),
        with_detours=round((path.instructions + path.detours) / elements, 2),
        resident_warps=warps,
        in_flight=warps * gpu.warp_size * path.outstanding,
        bytes_per_param=round(step.bytes_per_param, 4),
        floor=variant.bytes_per_element,
        launches=step.launches,
    )


if __name__ == "__main__":
    sys.exit(main())
