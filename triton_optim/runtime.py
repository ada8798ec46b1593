"""Triton's side of the house: where the kernels run on this machine, and how one is launched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from .kernels import multi_tensor, rules
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    # Triton has no wheel for this platform: every parameter goes torch's own way.
    COMPILED = False
    DEVICE_TYPE = None
    ROW_WIDTH = 0
else:
    # A kernel reads addresses from a table, so an interpreted one must not be given a GPU's.
    COMPILED = isinstance(multi_tensor.multi_tensor_kernel, triton.runtime.JITFunction)
    DEVICE_TYPE = "cuda" if COMPILED else "cpu"
    ROW_WIDTH = multi_tensor.ROW_WIDTH.value

# Storage dtypes; a complex tensor is stored as pairs of the real dtype beside it.
STORAGE_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}

HALF_DTYPES = {"bfloat16", "float16"}

ALIGNMENT = 16  # bytes: a 128-bit load

# A thread updates 8 elements: more take too many registers. Blocks of 16-bit tensors are larger, so
# that a program moves enough bytes beside its share of the tables.
COMPILED_BLOCK_SIZE = 1024
COMPILED_BLOCK_SIZE_16_BIT = 2048
ELEMENTS_PER_THREAD = 8
THREADS_PER_WARP = 64 if torch.version.hip else 32
# An interpreted program costs about as much as 40,000 of its elements.
INTERPRETED_BLOCK_SIZES = tuple(1 << k for k in range(10, 19))
INTERPRETED_OVERHEAD = 40_000


class Variant(NamedTuple):
    """What a compiled kernel depends on: never a size, a count, a rate or a step."""

    flags: frozenset[str]
    n_states: int
    param_dtype: str
    grad_dtype: str
    state_dtype: str
    aligned: bool
    reads_step: bool


class Tables(NamedTuple):
    """What a launch reads, all on the parameters' device."""

    rows: Tensor  # int64 [tensors, ROW_WIDTH]
    grads: Tensor  # int64 [tensors]
    hypers: Tensor  # float64 [groups, hyperparameters]
    steps: Tensor | None  # floating [tensors]


def block_size(variant: Variant, numels: Iterable[int]) -> int:
    """Elements a program updates, for tensors of these numbers of elements."""
    if COMPILED:
        return compiled_block_size(variant)
    numels = list(numels)
    return min(
        INTERPRETED_BLOCK_SIZES,
        key=lambda size: (INTERPRETED_OVERHEAD + size) * sum(-(-n // size) for n in numels),
    )


def compiled_block_size(variant: Variant) -> int:
    """Elements a program updates on a GPU."""
    dtypes = {variant.param_dtype, variant.grad_dtype, variant.state_dtype}
    return COMPILED_BLOCK_SIZE_16_BIT if dtypes <= HALF_DTYPES else COMPILED_BLOCK_SIZE


def num_warps(size: int, threads_per_warp: int = THREADS_PER_WARP) -> int:
    """Warps of a compiled program that updates `size` elements."""
    return size // (ELEMENTS_PER_THREAD * threads_per_warp)


def launch(rule: str, variant: Variant, blocks: Tensor, size: int, tables: Tables) -> None:
    """Launch the update kernel: one program an entry of `blocks`, `size` elements each."""
    on_gpu = blocks.device.type == "cuda"
    with torch.cuda.device(blocks.device) if on_gpu else nullcontext():
        multi_tensor.multi_tensor_kernel[(len(blocks),)](
            blocks,
            tables.rows,
            tables.grads,
            tables.hypers,
            tables.steps if variant.reads_step else None,
            RULE=getattr(rules, rule),
            FLAGS=sum(getattr(rules, flag).value for flag in variant.flags),
            N_HYPERS=tables.hypers.shape[1],
            N_STATES=variant.n_states,
            PARAM_DTYPE=getattr(tl, variant.param_dtype),
            GRAD_DTYPE=getattr(tl, variant.grad_dtype),
            STATE_DTYPE=getattr(tl, variant.state_dtype),
            ALIGNED=variant.aligned,
            BLOCK_SIZE=size,
            num_warps=num_warps(size) if COMPILED else 1,
            enable_fp_fusion=True,
        )


def row(numel: int, group: int, addresses: Sequence[int]) -> list[int]:
    """A row of the tensor table; `addresses`: the parameter's, then one a state."""
    values = [numel, group, *addresses]
    return values + [0] * (ROW_WIDTH - len(values))
