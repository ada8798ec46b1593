"""The compiled kernels over gradients alone, on four architectures: registers, vectors, sectors.

As a script, in a process where Triton compiles, it prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
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
    "blocks": "i32",
}


def _compile(architecture: str, kernel: Any, dtype: str, **constants: Any) -> Any:
    import triton
    from lab.gpus import GPUS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from triton_optim.launch import backend, tuning

    config = tuning.grad_config(architecture, half=dtype.endswith("16"))
    constants |= {"DTYPE": backend.triton_dtype(dtype), "BLOCK_SIZE": config.block_size}
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


def _adjacent(ttgir: str, dtype: str) -> int:
    """How many elements next to each other a thread loads of a block of gradients."""
    element = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    loaded = rf"tt\.load (?!.*cacheModifier).*tensor<\d+x!tt\.ptr<{element}>, (#\w+)>"
    layouts = {
        int(re.search(rf"^{name} = .*sizePerThread = \[(\d+)\]", ttgir, re.MULTILINE)[1])  # type: ignore[index]
        for name in re.findall(loaded, ttgir)
    }
    (elements,) = layouts
    return elements


def main() -> None:
    from lab.disassembly import amdgcn, amdgcn_usage, sass, sass_usage
    from lab.gpus import GPUS

    from triton_optim.kernels.norm import norm_kernel, scale_kernel

    os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
    found = {}
    kernels: Any = ((norm_kernel, {"ADDS": False}), (scale_kernel, {}))
    for architecture, (kernel, flags), aligned in product(GPUS, kernels, (True, False)):
        compiled = [_compile(architecture, kernel, d, ALIGNED=aligned, **flags) for d in DTYPES]
        if architecture.startswith("gfx"):
            texts = [c.asm["amdgcn"] for c in compiled]
            codes, usages = [*map(amdgcn, texts)], [*map(amdgcn_usage, texts)]
        else:
            cubins = [c.asm["cubin"] for c in compiled]
            codes, usages = sass(cubins, architecture), [*map(sass_usage, cubins)]
        for dtype, code, usage, binary in zip(DTYPES, codes, usages, compiled, strict=True):
            widest = {
                kind: max((i.n_bytes for i in code if i.access == kind), default=0)
                for kind in ("load", "store")
            }
            name = f"{architecture} {kernel.fn.__name__} {dtype} {'' if aligned else 'mis'}aligned"
            adjacent = _adjacent(binary.asm["ttgir"], dtype)
            found[name] = {
                "registers": usage.registers, "spills": usage.spills, "adjacent": adjacent, **widest
            }  # fmt: skip
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
    assert len(found) == 4 * 2 * 2 * len(DTYPES)
    for name, row in found.items():
        assert row["spills"] == 0, name
        assert row["registers"] <= 128, name
        if " aligned" in name:
            assert row["load"] == 16, name
            assert row["store"] == 16 or "norm_kernel" in name, name


def test_a_warp_loads_no_sector_twice(found: dict[str, dict[str, int]]) -> None:
    """Elements that are loaded one by one are those of one thread each, side by side."""
    misaligned = {name: row["adjacent"] for name, row in found.items() if "misaligned" in name}
    assert misaligned == dict.fromkeys(misaligned, 1)


if __name__ == "__main__":
    main()
