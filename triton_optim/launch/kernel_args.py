"""What kernels are given: compile-time arguments, tables, and the compiler's options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..rule import Rule
from . import backend
from .tuning import Config
from .variant import Variant

# Left alone, ptxas squeezes kernels of two states into 64 registers, of three into 80, and gated
# ones of one state, or with a remainder, into 56, where some spill. Those that round stochastically
# it leaves what they need, and limits made them spill.
STATES_REGISTERS = {2: 80, 3: 96}
MISALIGNED_REGISTERS = 16  # more, where elements are loaded one by one
GATED_REGISTERS = 64
GATED_DOUBLE_REGISTERS = {1: 112, 2: 144}  # by states, for float64, where it has 96 and 128
FEW_ELEMENTS = 256  # that a warp holds at once; with more, or in a loop, these are too few

TAIL_SIZE = 256  # of the last blocks of a tensor, where masks cost a format registers


class Tables(NamedTuple):
    """What a launch reads, on the parameters' device; `norm` and `step_status` under conditions."""

    rows: Tensor  # int64 [tensors, ROW_WIDTH]
    grads: Tensor  # int64 [tensors]
    hypers: Tensor  # float64 [groups, hyperparameters]
    steps: Tensor | None  # float64 [tensors, scalars of each]
    formats: Tensor | None = None  # int64 [tensors, FORMAT_WIDTH]
    max_norm: Tensor | None = None  # float64 []
    norm: Tensor | None = None  # float64 []
    step_status: Tensor | None = None  # float32 [2]: 1 if the step was taken, 1 if it was skipped


def rule_constants(rule: Rule, function: Any, names: Iterable[str]) -> dict[str, Any]:
    """What kernels know at compile time of a rule, one of its functions, and flags."""
    return {"RULE": function, "FLAGS": backend.flag_bits(names), "DOUBLES": rule.doubles}


def constants(rule: Rule, variant: Variant, config: Config, n_hypers: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, by name."""
    return {
        **rule_constants(rule, rule.function, variant.all_flags),
        "N_HYPERS": n_hypers,
        "STEP_COLUMNS": rule.step_columns,
        "N_STATES": variant.n_states,
        "FORMATS": sum(
            backend.format_number(name) << 4 * i for i, name in enumerate(variant.written)
        ),
        "SHARDING": variant.sharding,
        "GRAD_DTYPE": backend.triton_dtype(variant.grad_dtype),
        "ALIGNED": variant.aligned,
        "SKIP_NONFINITE": "SKIP_NONFINITE" in variant.conditions,
        "BLOCK_SIZE": config.block_size,
        "TAIL_SIZE": TAIL_SIZE if backend.COMPILED and variant.has_formats else config.block_size,
        "BLOCKS": config.blocks,
        "NUM_STAGES": config.num_stages,
        "EVICTION": config.eviction,
    }


def unused_pointers(variant: Variant) -> list[str]:
    """The update kernel's pointers that are None."""
    enabled = variant.conditions
    used = {
        "format_table_ptr": variant.has_formats,
        "steps_ptr": variant.reads_step,
        "found_inf_ptr": "FOUND_INF" in enabled,
        "grad_scale_ptr": "UNSCALE" in enabled,
        "grad_norm_ptr": not enabled.isdisjoint(("CLIP", "SKIP_NONFINITE")),
        "max_norm_ptr": "CLIP" in enabled,
        "step_status_ptr": variant.may_skip,
    }
    return [name for name, is_used in used.items() if not is_used]


def options(variant: Variant, config: Config, architecture: str) -> dict[str, Any]:
    """The compiler's options, by name."""
    chosen = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    elements = config.block_size // config.num_warps
    few = elements <= FEW_ELEMENTS and config.blocks == 1 and not variant.rounds
    if architecture.startswith("sm_") and few and variant.param_dtype == "float64":
        if variant.conditions and variant.n_states in GATED_DOUBLE_REGISTERS:
            chosen["maxnreg"] = GATED_DOUBLE_REGISTERS[variant.n_states]
    elif architecture.startswith("sm_") and few:
        more = 0 if variant.aligned else MISALIGNED_REGISTERS
        if architecture == "sm_100" and variant.n_states == 2 and "DECOUPLED" in variant.flags:
            more += 8  # where AdamW with bfloat16 parameters and float32 state spilled
        if variant.n_states in STATES_REGISTERS:
            chosen["maxnreg"] = STATES_REGISTERS[variant.n_states] + more
        elif variant.n_states == 1 and "DECOUPLED" in variant.flags:
            chosen["maxnreg"] = GATED_REGISTERS + more
        elif (
            variant.n_states == 1
            and not variant.aligned
            and (variant.conditions or variant.has_formats)
        ):
            chosen["maxnreg"] = GATED_REGISTERS
    return chosen


def row(
    numel: int, group: int, first: int, addresses: Sequence[int], norm_first: int = 0
) -> list[int]:
    """A row of the tensor table.

    Args:
        numel: elements.
        group: its row of hyperparameters.
        first: the first of its programs in the update.
        addresses: the parameter's, then one a state.
        norm_first: the first of its programs in launches over gradients alone.
    """
    values = [numel, group, first, norm_first, *addresses]
    return values + [0] * (backend.ROW_WIDTH - len(values))
