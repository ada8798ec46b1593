"""The compiled kernels over gradients alone, on four architectures: registers, vectors, sectors.

As a script, in a process where Triton compiles, it prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _compile(architecture: str, kernel: Any, dtype: str, **constants: Any) -> Any:
    from triton_optim.launch import backend, tuning
    from triton_optim.testing.compiled import compile_for

    config = tuning.grad_config(architecture, half=dtype.endswith("16"))
    constants |= {"DTYPE": backend.triton_dtype(dtype), "BLOCK_SIZE": config.block_size}
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    return compile_for(architecture, kernel, constants, options, partials_ptr="*fp64")


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
    from lab.disassembly import disassembled
    from lab.gpus import GPUS

    from triton_optim.kernels.norm import norm_kernel, scale_kernel

    found = {}
    kernels: Any = ((norm_kernel, {"ACCUMULATE": False}), (scale_kernel, {}))
    for architecture, (kernel, flags), aligned in product(GPUS, kernels, (True, False)):
        compiled = [_compile(architecture, kernel, d, ALIGNED=aligned, **flags) for d in DTYPES]
        read = zip(DTYPES, compiled, disassembled(architecture, compiled), strict=True)
        for dtype, binary, (code, usage) in read:
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
