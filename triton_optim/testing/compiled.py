"""Kernels compiled ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch import backend, kernel_args, tuning
from ..launch.variant import Variant
from ..rule import Rule

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

# The kernels' run-time arguments as a GPU is given them; keys of fewer than 2**31 rows.
ARGUMENTS = {
    name: kind
    for kind, names in {
        "*i32": "block_to_tensor_ptr keys_ptr arrival_count_ptr arrival_counts_ptr",
        "*i64": "tensor_table_ptr format_table_ptr tensors_ptr grads_ptr permutation_ptr",
        "*fp32": "found_inf_ptr grad_scale_ptr step_status_ptr",
        "*fp64": "hyperparameters_ptr steps_ptr sum_ptr norm_ptr grad_norm_ptr max_norm_ptr",
        "i32": "blocks first_tensor n_tensors chunk",
        "fp32": "n_bytes",
    }.items()
    for name in names.split()
}

_PTX_ACCESS = re.compile(r"(?:ld|st)\.global[.\w]*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_AMDGCN_ACCESS = re.compile(r"(?:buffer|flat|global)_(?:load|store)_dword(x\d)?\b")


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # 32-bit ones, a thread
    spills: int  # bytes a thread


class Compiled(NamedTuple):
    """What an update kernel is compiled to."""

    architecture: str
    dtype: str  # of parameters
    usage: Usage
    bits: int  # of the widest load or store of a thread


def compile_for(
    architecture: str,
    kernel: Any,
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    **types: str,
) -> Any:
    """A Triton kernel for "sm_90" or another GPU. Not in a process where Triton interprets.

    Args:
        constants: the arguments that it is compiled for.
        types: of arguments that are not in `ARGUMENTS`; pointers are multiples of 16 bytes.
    """
    names = kernel.arg_names
    given = {name: {**ARGUMENTS, **types}[name] for name in names if name not in constants}
    source = ASTSource(
        kernel,
        {name: given.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in given if given[n][0] == "*"},
    )
    if architecture.startswith("gfx"):
        # Triton before 3.5 wants ROCm's linker; what is read here is the assembly before it.
        os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
        warp_size = 64 if architecture.startswith("gfx9") else 32
        target = GPUTarget("hip", architecture, warp_size)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(options))


def compile_update(rule: Rule, variant: Variant, n_hypers: int, architecture: str) -> Any:
    """The kernel that updates whole tensors, as a launch on such a GPU would have it compiled."""
    from ..kernels.multi_tensor import multi_tensor_kernel

    config = tuning.config(architecture, half=variant.half)
    constants = kernel_args.constants(rule, variant, config, n_hypers)
    constants |= dict.fromkeys(kernel_args.unused_pointers(variant))
    options = kernel_args.options(variant, config, architecture)
    return compile_for(architecture, multi_tensor_kernel, constants, options)


def usage(architecture: str, kernel: Any) -> Usage:
    """Registers and spills, as NVIDIA's cuobjdump or AMD's assembly tell them."""
    if architecture.startswith("gfx"):
        return _amdgcn_usage(kernel.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(BINARIES / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return Usage(int(found[1]), int(found[2]))


def _amdgcn_usage(text: str) -> Usage:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    spilled = number("sgpr_spill_count") + number("vgpr_spill_count")
    scratch = number("private_segment_fixed_size")
    return Usage(number("amdhsa_next_free_vgpr"), max(scratch, 4 * spilled))


def widest_access(architecture: str, kernel: Any) -> int:
    """Bits of the widest load or store of a thread."""
    if architecture.startswith("gfx"):
        found = _AMDGCN_ACCESS.findall(kernel.asm["amdgcn"])
        return max(32 * int(times[1:] or 1) for times in found)
    accesses = _PTX_ACCESS.findall(kernel.asm["ptx"])
    return max(int(times or 1) * int(bits) for times, bits in accesses)


def compile_updates(
    optimizer_class: type[Any], variants: Sequence[tuple[Variant, int]]
) -> list[Compiled]:
    """A class's update kernels on `ARCHITECTURES`; in a process of its own, if these interpret.

    Args:
        variants: with the number of their hyperparameters.

    Raises:
        RuntimeError: the class cannot be imported there.
    """
    if backend.COMPILED:
        return _compile_updates(optimizer_class.rule, variants)
    main = getattr(sys.modules["__main__"], "__file__", "")
    module, name = optimizer_class.__module__, optimizer_class.__qualname__
    asked = pickle.dumps((module, name, main, sys.path, variants))
    command = [sys.executable, "-c", f"from {__name__} import answer; answer()"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, input=asked, capture_output=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} of {module} could not be compiled:\n{done.stderr.decode()}")
    found: list[Compiled] = pickle.loads(done.stdout)
    return found


def answer() -> None:
    """The other process of `compile_updates`."""
    module, name, main, path, variants = pickle.loads(sys.stdin.buffer.read())
    sys.path[:] = path
    if hasattr(triton, "knobs"):
        triton.knobs.runtime.interpret = False  # whatever the class's module sets
    with redirect_stdout(sys.stderr):
        if module == "__main__":
            found = runpy.run_path(main, run_name="__mp_main__")
        else:
            found = vars(importlib.import_module(module))
    optimizer_class = reduce(getattr, name.split(".")[1:], found[name.partition(".")[0]])
    rows = _compile_updates(optimizer_class.rule, variants)
    sys.stdout.buffer.write(pickle.dumps(rows))


def _compile_updates(rule: Rule, variants: Sequence[tuple[Variant, int]]) -> list[Compiled]:
    rows = []
    for architecture in ARCHITECTURES:
        for variant, n_hypers in variants:
            kernel = compile_update(rule, variant, n_hypers, architecture)
            bits = widest_access(architecture, kernel)
            own = usage(architecture, kernel)
            rows.append(Compiled(architecture, variant.param_dtype, own, bits))
    return rows
