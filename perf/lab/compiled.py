"""Kernels compiled ahead of time, as a launch on a GPU would have them compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lab.gpus import GPUS
from triton_optim.launch import backend
from triton_optim.rule import ROW_ARGUMENTS, RowWise, Rule

# The kernels' run-time arguments as a GPU is given them; keys of fewer than 2**31 rows.
ARGUMENTS = {
    name: kind
    for kind, names in {
        "*i32": "block_to_tensor_ptr keys_ptr arrival_count_ptr arrival_counts_ptr",
        "*i64": "tensor_table_ptr tensors_ptr grads_ptr permutation_ptr",
        "*fp32": "found_inf_ptr grad_scale_ptr step_status_ptr",
        "*fp64": "hyperparameters_ptr steps_ptr sum_ptr norm_ptr grad_norm_ptr max_norm_ptr",
        "i32": "blocks first_tensor n_tensors chunk",
        "fp32": "n_bytes",
    }.items()
    for name in names.split()
}


def compile_for(
    architecture: str,
    kernel: Any,
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    **types: str,
) -> Any:
    """A Triton kernel for "sm_90" or another of `GPUS`. Not in a process where Triton interprets.

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
    warp_size = GPUS[architecture].warp_size
    if architecture.startswith("gfx"):
        # Triton before 3.5 wants ROCm's linker; what is read here is the assembly before it.
        os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
        target = GPUTarget("hip", architecture, warp_size)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), warp_size)
    return triton.compile(source, target=target, options=dict(options))


def built_in(name: str) -> Rule:
    """A rule as kernels know it, of the name of its function in kernels/rules.py."""
    function = getattr(backend.rules, name)
    of_rows = len(function.arg_names) == ROW_ARGUMENTS
    return Rule(function, doubles=True, row_wise=RowWise(always=of_rows))


def rule_and_flags(rule: str, flags: Iterable[str]) -> str:
    """How reports call an update: "rmsprop CENTERED+MOMENTUM"."""
    return f"{rule.removesuffix('_rule')} {'+'.join(sorted(flags)) or '-'}"


def short(dtype: str) -> str:
    """ "f32" of "float32"."""
    return dtype.replace("float", "f")
