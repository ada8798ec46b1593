"""Compiles the kernels ahead of time, which needs no GPU. Run without TRITON_INTERPRET.

Prints one JSON list: a record a kernel and architecture.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_optim import runtime
from triton_optim.kernels import multi_tensor, rules

# rule, flags, hyperparameters, states, whether it reads the step
KERNELS = {
    "sgd": ("sgd_rule", [], 4, 0, False),
    "sgd-nesterov": ("sgd_rule", ["MOMENTUM", "NESTEROV"], 4, 1, True),
    "adagrad": ("adagrad_rule", [], 4, 1, False),
    "adagrad-lr_decay": ("adagrad_rule", ["LR_DECAY", "MAXIMIZE"], 4, 1, True),
    "rmsprop": ("rmsprop_rule", [], 6, 1, False),
    "rmsprop-all": ("rmsprop_rule", ["CENTERED", "MOMENTUM"], 6, 3, False),
}
# parameter and gradient, state
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main(architectures: list[str]) -> None:
    # Triton before 3.5 wants ROCm's linker; what is read here is the assembly before it.
    os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
    records = [
        _record(name, dtypes, architecture)
        for architecture in architectures
        for name in KERNELS
        for dtypes in DTYPES
    ]
    json.dump(records, sys.stdout)


def _record(name: str, dtypes: tuple[str, str], architecture: str) -> dict[str, Any]:
    compiled = _compile(name, dtypes, architecture)
    record = {"name": name, "dtypes": dtypes, "architecture": architecture}
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        widths = re.findall(r"(?:global|buffer)_(load|store)_dword(?:x(\d))?", text)
        return record | {"spills": spills, "widest": _widest(widths, 32)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass)) + int(found[2])
    widths = [
        ("load" if kind == "LDG" else "store", bits)
        for kind, bits in re.findall(r"\b(LDG|STG)\.E(?:\.[A-Z]+\w*)*?\.(64|128)\b", sass)
    ]
    return record | {"registers": int(found[1]), "spills": spills, "widest": _widest(widths, 1)}


def _widest(accesses: list[tuple[str, str]], unit: int) -> dict[str, int]:
    """Bits of the widest load and store."""
    return {
        kind: max((int(n or 1) * unit for k, n in accesses if k == kind), default=0)
        for kind in ("load", "store")
    }


def _compile(name: str, dtypes: tuple[str, str], architecture: str) -> Any:
    rule, flags, n_hypers, n_states, reads_step = KERNELS[name]
    variant = runtime.Variant(
        frozenset(flags), n_states, dtypes[0], dtypes[0], dtypes[1], True, reads_step
    )
    kernel = multi_tensor.multi_tensor_kernel
    constants: dict[str, Any] = {
        "RULE": getattr(rules, rule),
        "FLAGS": sum(getattr(rules, flag).value for flag in flags),
        "N_HYPERS": n_hypers,
        "N_STATES": n_states,
        "PARAM_DTYPE": getattr(tl, dtypes[0]),
        "GRAD_DTYPE": getattr(tl, dtypes[0]),
        "STATE_DTYPE": getattr(tl, dtypes[1]),
        "ALIGNED": True,
        "BLOCK_SIZE": runtime.compiled_block_size(variant),
    }
    pointers = {
        "blocks_ptr": "*i64",
        "rows_ptr": "*i64",
        "grads_ptr": "*i64",
        "hypers_ptr": "*fp64",
    }
    if reads_step:
        pointers["steps_ptr"] = "*fp32"
    else:
        constants["steps_ptr"] = None
    signature = {n: pointers.get(n, "constexpr") for n in kernel.arg_names}
    place = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        {place[n]: value for n, value in constants.items()},
        {place[n]: [["tt.divisibility", 16]] for n in pointers},
    )
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    warps = runtime.num_warps(constants["BLOCK_SIZE"], target.warp_size)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def _run(tool: str, *args: str) -> str:
    command = [str(BINARIES / tool), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(sys.argv[1:])
