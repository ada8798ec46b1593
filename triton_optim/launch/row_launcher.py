"""Launches over rows: what they are compiled for, and how they are cut into programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import Rule
from ..tensors.layout import is_contiguous_resolved
from . import backend, kernel_args, tuning
from .backend import ALIGNMENT, COMPILED
from .kernel_args import Tables
from .launcher import Launch, RuleLaunch
from .pointer_tables import is_aligned
from .tuning import RowConfig
from .variant import ITEM_SIZES

if backend.DEVICE_TYPE:
    from ..kernels import keys
    from ..kernels.rows import rows_kernel

    TENSOR_COLUMNS, GRAD_COLUMNS = keys.TENSOR_COLUMNS.value, keys.GRAD_COLUMNS.value
else:
    TENSOR_COLUMNS = GRAD_COLUMNS = 0

MAX_NNZ = 2**31 - 2**21  # of rows, of a parameter or a gradient: a chunk more fits an int32
KEYS_BLOCK = 1024  # ids that a program turns into keys

# Left alone, ptxas spills in many of these kernels for the sake of one more program.
REGISTERS = 65536  # of a processor
MAX_REGISTERS = 255  # of a thread
FOUR_PROGRAMS_REGISTERS = 128  # where a processor holds 4 programs of 4 warps
THREE_PROGRAMS_REGISTERS = 168

INTERPRETED_ELEMENTS = 1 << 16  # of a program's block, where a program costs more than they do


class RowVariant(NamedTuple):
    """What a compiled kernel depends on: never a count of rows or tensors, a rate or a step."""

    sparse: bool
    flags: frozenset[str]
    n_states: int  # with a number for each element
    param_dtype: str
    grad_dtype: str
    state_dtype: str
    row_dtype: str | None  # of the state that has one number a row
    columns: int  # the least power of two that is no less than the elements of a row
    reads_step: bool
    multiple: int = 1  # of elements that are loaded together
    conditions: frozenset[str] = frozenset()  # see StepConditions.enabled

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.param_dtype == "float64" else torch.float32

    def loading(self, addresses: Iterable[int], widths: Iterable[int]) -> RowVariant:
        """The variant for tensors at these addresses, with rows of these widths."""
        dtypes = (self.param_dtype, self.grad_dtype, self.state_dtype)
        narrowest = min(ITEM_SIZES[dtype] for dtype in dtypes)
        most = ALIGNMENT // narrowest if is_aligned(addresses) else 1
        return self._replace(multiple=math.gcd(most, *widths))


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's, of a dtype that both call the same."""
    return str(dtype).removeprefix("torch.")


def rows_and_width(param: Tensor) -> tuple[int, int]:
    """How many rows a tensor has, and elements each."""
    rows = param.shape[0] if param.dim() else 1
    return rows, param.numel() // max(rows, 1)


def few_enough(grad: Tensor) -> bool:
    """Whether the kernels can count the rows of a sparse gradient."""
    return grad._nnz() <= MAX_NNZ


class Kind(NamedTuple):
    """What must stay as it is of a gradient while a table is kept."""

    type: type[Tensor]
    layout: torch.layout
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    sparse: object


def kind_of(grad: Tensor) -> Kind:
    is_sparse = grad.layout == torch.sparse_coo
    sparse = (grad.sparse_dim(), few_enough(grad)) if is_sparse else None
    return Kind(type(grad), grad.layout, grad.shape, grad.dtype, grad.device, sparse)


def address_of(values: Tensor | None) -> int:
    """0 of what will be copied, or is missing."""
    return values.data_ptr() if values is not None and is_contiguous_resolved(values) else 0


def columns_for(width: int) -> int:
    """The columns of a block that holds rows of so many elements."""
    return 1 << max(width - 1, 0).bit_length()


def config(variant: RowVariant, device: torch.device) -> RowConfig:
    """How a launch over rows is cut into programs."""
    if COMPILED:
        wide = variant.multiple > 2
        return tuning.row_config(backend.architecture(device), variant.columns, wide=wide)
    return RowConfig(max(INTERPRETED_ELEMENTS // variant.columns, 1), num_warps=1)


def constants(rule: Rule, variant: RowVariant, config: RowConfig, n_hypers: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, by name, and its pointers that are None."""
    dtype = backend.triton_dtype
    used = {
        "steps_ptr": variant.reads_step,
        "keys_ptr": variant.sparse,
        "permutation_ptr": variant.sparse,
        "partials_ptr": variant.sparse,
        "arrival_counts_ptr": variant.sparse,
        "found_inf_ptr": "FOUND_INF" in variant.conditions,
        "grad_scale_ptr": "UNSCALE" in variant.conditions,
        "step_status_ptr": "FOUND_INF" in variant.conditions,
    }
    return {
        **dict.fromkeys(name for name, is_used in used.items() if not is_used),
        **kernel_args.rule_constants(rule, rule.row_function, variant.flags),
        "N_HYPERS": n_hypers,
        "N_STATES": variant.n_states,
        "PARAM_DTYPE": dtype(variant.param_dtype),
        "GRAD_DTYPE": dtype(variant.grad_dtype),
        "STATE_DTYPE": dtype(variant.state_dtype),
        "ROW_DTYPE": None if variant.row_dtype is None else dtype(variant.row_dtype),
        "MULTIPLE": variant.multiple,
        "BLOCK_ROWS": config.block_rows,
        "COLUMNS": variant.columns,
    }


def options(variant: RowVariant, config: RowConfig, architecture: str) -> dict[str, Any]:
    """The compiler's options, by name."""
    chosen = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    if architecture.startswith("sm_"):
        chosen["maxnreg"] = min(_registers(variant), REGISTERS // (32 * config.num_warps))
    return chosen


def _registers(variant: RowVariant) -> int:
    """The most that a thread may have."""
    if variant.n_states > 1 or variant.param_dtype == "float64" or variant.multiple <= 2:
        return MAX_REGISTERS
    has_state = variant.n_states or variant.row_dtype is not None
    if variant.sparse and has_state and (variant.reads_step or variant.multiple > 4):
        return THREE_PROGRAMS_REGISTERS
    return FOUR_PROGRAMS_REGISTERS


class RowLaunch(RuleLaunch):
    """One update launch over all tensors of a variant.

    Args:
        rule: the update rule.
        variant: what the kernel is compiled for.
        tables: `rows` and `grads` as kernels/rows.py has them.
        tensors: which of their rows.
        key_dtype: int32 or int64.
    """

    variant: RowVariant

    def __init__(
        self,
        rule: Rule,
        variant: RowVariant,
        tables: Tables,
        tensors: range,
        key_dtype: torch.dtype,
    ) -> None:
        self._rule = rule
        device = tables.rows.device
        cut = config(variant, device)

        def later(dtype: torch.dtype) -> Tensor:
            return torch.empty(0, dtype=dtype, device=device)

        arguments = {
            "tensors_ptr": tables.rows,
            "grads_ptr": tables.grads,
            "hyperparameters_ptr": tables.hypers,
            "steps_ptr": tables.steps,
            "keys_ptr": later(key_dtype),
            "permutation_ptr": later(torch.int64),
            "partials_ptr": later(variant.compute_dtype),
            "arrival_counts_ptr": later(torch.int32),
            "found_inf_ptr": tables.step_status,
            "grad_scale_ptr": tables.step_status,
            "step_status_ptr": tables.step_status,
            "first_tensor": tensors.start,
            "n_tensors": len(tensors),
            "chunk": cut.block_rows,
            **constants(rule, variant, cut, tables.hypers.shape[1]),
        }
        chosen = options(variant, cut, backend.architecture(device)) if COMPILED else {}
        super().__init__(rows_kernel, variant, 1, arguments, chosen, device)


class KeysLaunch(Launch):
    """The launch that makes the keys, int32 or int64, of all sparse gradients."""

    def __init__(self, tables: Tables, key_dtype: torch.dtype) -> None:
        device = tables.rows.device
        arguments = {
            "tensors_ptr": tables.rows,
            "grads_ptr": tables.grads,
            "keys_ptr": torch.empty(0, dtype=key_dtype, device=device),
            "BLOCK_SIZE": KEYS_BLOCK,
        }
        chosen = {"num_warps": 4, "enable_fp_fusion": True} if COMPILED else {}
        super().__init__(keys.keys_kernel, None, 1, arguments, chosen, device)


def tensor_row(
    group: int, width: int, rows: int, first_key: int, addresses: Sequence[int], row_state: int
) -> list[int]:
    """A row of the tensor table.

    Args:
        group: its row of hyperparameters.
        width: elements of a row.
        rows: of the tensor.
        first_key: that of its row 0.
        addresses: the parameter's, then one a state.
        row_state: address of the state that has one number a row, or 0.
    """
    values = [group, width, rows, first_key, *addresses]
    return [*values, *[0] * (TENSOR_COLUMNS - 1 - len(values)), row_state]
