"""The compiled kernels over gradients alone, on four architectures: registers and vectors.

As a script, in a process where Triton compiles, it prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "bfloat16", "float16", "float64")
POINTERS = {
    "owners_ptr": "*i32",
    "rows_ptr": "*i64",
    "grads_ptr": "*i64",
    "partials_ptr": "*fp64",
    "ticket_ptr": "*i32",
    "sum_ptr": "*fp64",
    "norm_ptr": "*fp64",
    "max_norm_ptr": "*fp64",
    "grad_scale_ptr": "*fp32",
    "n_bytes": "fp32",
}


def _compile(architecture: str, kernel: Any, dtype: str, **flags: bool) -> Any:
    import triton
    from lab.gpus import GPUS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from triton_optim import runtime, tuning

    config = tuning.grad_config(architecture, half=dtype.endswith("16"))
    constants = {"DTYPE": runtime.triton_dtype(dtype), "ALIGNED": True, **flags}
    constants |= {"BLOCK_SIZE": config.block_size, "BLOCKS": config.blocks}
    names = kernel.arg_names
    place = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        kernel,
        {name: POINTERS.get(name, "constexpr") for name in names},
        {place[name]: value for name, value in constants.items()},
        {place[n]: [["tt.divisibility", 16]] for n in names if POINTERS.get(n, "")[:1] == "*"},
    )
    gpu = architecture.startswith("gfx")
    target = architecture if gpu else int(architecture.removeprefix("sm_"))
    return triton.compile(
        source,
        target=GPUTarget("hip" if gpu else "cuda", target, GPUS[architecture].warp_size),
        options={"num_warps": config.num_warps, "enable_fp_fusion": True},
    )


def main() -> None:
    from lab.disassembly import amdgcn, amdgcn_usage, sass, sass_usage
    from lab.gpus import GPUS

    from triton_optim.kernels.norm import norm_kernel, scale_kernel

    os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
    found = {}
    for architecture in GPUS:
        for kernel, flags in ((norm_kernel, {"ADDS": False}), (scale_kernel, {})):
            compiled = [_compile(architecture, kernel, dtype, **flags) for dtype in DTYPES]
            if architecture.startswith("gfx"):
                texts = [c.asm["amdgcn"] for c in compiled]
                codes, usages = [*map(amdgcn, texts)], [*map(amdgcn_usage, texts)]
            else:
                cubins = [c.asm["cubin"] for c in compiled]
                codes, usages = sass(cubins, architecture), [*map(sass_usage, cubins)]
            for dtype, code, usage in zip(DTYPES, codes, usages, strict=True):
                widest = {
                    kind: max((i.n_bytes for i in code if i.access == kind), default=0)
                    for kind in ("load", "store")
                }
                name = f"{architecture} {kernel.fn.__name__} {dtype}"
                found[name] = {"registers": usage.registers, "spills": usage.spills, **widest}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "perf")])
    command = [sys.executable, __file__]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    rows: dict[str, dict[str, int]] = json.loads(done.stdout)
    return rows


def test_nothing_spills_and_vectors_are_whole(found: dict[str, dict[str, int]]) -> None:
    assert len(found) == 4 * 2 * len(DTYPES)
    for name, row in found.items():
        assert row["spills"] == 0, name
        assert row["registers"] <= 128, name
        assert row["load"] == 16, name
        assert row["store"] == 16 or "norm_kernel" in name, name


if __name__ == "__main__":
    main()
