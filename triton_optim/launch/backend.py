"""Triton's side of the house: where the kernels run on this machine, and what they are made of."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import Rule
from ..tensors.float8 import GROUP_SIZE
from . import tuning
from .tuning import Config


class _NoKernels:
    """Stands in for functions of kernels/ where Triton is not installed."""

    def __getattr__(self, name: str) -> None:
        return None


try:
    import triton
    import triton.language as tl

    from ..kernels import chunks, flags, formats, multi_tensor
    from ..kernels import rules as kernel_rules
    from ..kernels import scalar_state as kernel_scalars
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    # Triton has no wheel for this platform: every parameter falls back to torch's implementation.
    COMPILED = False
    DEVICE_TYPE = None
    ROW_WIDTH = FORMAT_WIDTH = 0
    rules: Any = _NoKernels()
    scalar_state: Any = _NoKernels()

    def flag(name: str) -> Any:
        """A flag of rules; there are none without Triton."""

else:
    # A kernel reads addresses from a table, so an interpreted one must not be given a GPU's.
    COMPILED = isinstance(multi_tensor.multi_tensor_kernel, triton.runtime.JITFunction)
    DEVICE_TYPE = "cuda" if COMPILED else "cpu"
    ROW_WIDTH, FORMAT_WIDTH = chunks.ROW_WIDTH.value, chunks.FORMAT_WIDTH.value
    rules, scalar_state, flag = kernel_rules, kernel_scalars, flags.flag

# Storage dtypes; a complex tensor is stored as pairs of the real dtype beside it.
STORAGE_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}

# Bytes of an element in each format, of kernels/formats.py.
ITEM_SIZES = {n: d.itemsize for d, n in STORAGE_DTYPES.items() if not d.is_complex}
ITEM_SIZES |= {"bfloat16_stochastic": 2, "float16_stochastic": 2, "bfloat16_remainder": 4}
ITEM_SIZES |= {"float8_e5m3": 1, "float8_e4m3": 1}  # and a byte for each group
STOCHASTIC = frozenset(name for name in ITEM_SIZES if name.endswith("_stochastic") or "8_" in name)

CAPTURABLE_DEVICE_TYPES = frozenset({"cuda"})  # where there are CUDA graphs, or HIP's

_CURRENT: AbstractContextManager[object] = nullcontext()

ALIGNMENT = 16  # bytes: a 128-bit load

# Left alone, ptxas squeezes kernels of two states into 64 registers, of three into 80, and gated
# ones of one state into 56, where some spill. Those that round stochastically it leaves what they
# need, and limits made them spill.
STATES_REGISTERS = {2: 80, 3: 96}
MISALIGNED_REGISTERS = 16  # more, where elements are loaded one by one
GATED_REGISTERS = 64
GATED_DOUBLE_REGISTERS = {1: 112, 2: 144}  # by states, for float64, where it has 96 and 128
FEW_ELEMENTS = 256  # that a warp holds at once; with more, or in a loop, these are too few

TAIL_SIZE = 256  # of the last blocks of a tensor, where masks cost a format registers

# An interpreted program costs about as much as 40,000 of its elements.
INTERPRETED_BLOCK_SIZES = tuple(1 << k for k in range(10, 19))
INTERPRETED_OVERHEAD = 40_000


class Variant(NamedTuple):
    """What a compiled kernel depends on: never a size, a count, a rate or a step."""

    flags: frozenset[str]
    param_dtype: str  # with its format, as those of states
    grad_dtype: str
    state_dtypes: tuple[str, ...]
    aligned: bool
    reads_step: bool
    conditions: frozenset[str] = frozenset()  # see StepConditions.enabled
    sharding: int = 0  # see kernels/random_bits.py

    @property
    def all_flags(self) -> frozenset[str]:
        return self.flags | ({"APPROXIMATE"} if self.is_approximate else frozenset())

    @property
    def n_states(self) -> int:
        return len(self.state_dtypes)

    @property
    def state_dtype(self) -> str:
        """Of all states, for tables: the parameter's dtype where there is none."""
        return "+".join(dict.fromkeys(self.state_dtypes)) or self.param_dtype

    @property
    def written(self) -> tuple[str, ...]:
        """Formats of the parameter and its states."""
        return self.param_dtype, *self.state_dtypes

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded stochastically."""
        return not STOCHASTIC.isdisjoint(self.written)

    @property
    def is_approximate(self) -> bool:
        """Whether everything that is written is rounded so."""
        return STOCHASTIC.issuperset(self.written)

    @property
    def has_formats(self) -> bool:
        """Whether anything is stored in another format than a dtype of torch."""
        return any("_" in name for name in self.written)

    @property
    def bytes_per_element(self) -> int:
        """The gradient read once, parameter and state read once and written once.

        And the gradient written once, where it is unscaled.
        """
        grads = 2 if "UNSCALE" in self.conditions else 1
        written = sum(ITEM_SIZES[name] for name in self.written)
        return 2 * written + grads * ITEM_SIZES[self.grad_dtype]

    @property
    def may_skip(self) -> bool:
        """Whether the kernel may find that the step does not happen."""
        return not self.conditions.isdisjoint(("FOUND_INF", "SKIP_NONFINITE"))

    @property
    def has_groups(self) -> bool:
        """Whether some state is of 8 bits, with exponents of groups."""
        return any(name.startswith("float8") for name in self.written)

    @property
    def half(self) -> bool:
        """Whether no tensor is of 32 bits or more."""
        names = (*self.written, self.grad_dtype)
        return all(name.startswith(("bfloat16", "float16", "float8")) for name in names)


class GradVariant(NamedTuple):
    """What a compiled kernel over gradients alone depends on."""

    dtype: str
    aligned: bool


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


def config(variant: Variant, numels: Iterable[int], device: torch.device) -> Config:
    """How a launch over tensors of these numbers of elements is cut into programs."""
    if COMPILED:
        return tuning.config(architecture(device), half=variant.half)
    numels = list(numels)
    size = min(
        (max(size, GROUP_SIZE) if variant.has_groups else size for size in INTERPRETED_BLOCK_SIZES),
        key=lambda size: (INTERPRETED_OVERHEAD + size) * sum(-(-n // size) for n in numels),
    )
    return Config(size, num_warps=1)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device's current stream goes into a CUDA graph."""
    if device.type not in CAPTURABLE_DEVICE_TYPES:
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, on which Triton launches and torch captures."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device(device)


def captures_pinned_memory() -> bool:
    """Whether torch allocates pinned memory while a CUDA graph is captured."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 11)


def grad_config(dtype: str, device: torch.device) -> Config:
    """How a launch over gradients alone is cut into programs."""
    if COMPILED:
        return tuning.grad_config(architecture(device), half=ITEM_SIZES[dtype] == 2)
    sizes = INTERPRETED_BLOCK_SIZES
    return Config(sizes[len(sizes) // 2], num_warps=1, blocks=2)


@cache
def architecture(device: torch.device) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_dtype(name: str) -> Any:
    return getattr(tl, name)


def flag_names() -> Collection[str] | None:
    """Of all flags that were made; None where there is no Triton."""
    return flags.BITS.keys() if DEVICE_TYPE else None


def rule_constants(rule: Rule, function: Any, names: Iterable[str]) -> dict[str, Any]:
    """What kernels know at compile time of a rule, one of its functions, and flags."""
    bits = sum(flags.BITS[name] for name in names)
    return {"RULE": function, "FLAGS": bits, "DOUBLES": rule.doubles}


def constants(rule: Rule, variant: Variant, config: Config, n_hypers: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, by name."""
    return {
        **rule_constants(rule, rule.function, variant.all_flags),
        "N_HYPERS": n_hypers,
        "STEP_COLUMNS": rule.step_columns,
        "N_STATES": variant.n_states,
        "FORMATS": sum(_format(name) << 4 * i for i, name in enumerate(variant.written)),
        "SHARDING": variant.sharding,
        "GRAD_DTYPE": getattr(tl, variant.grad_dtype),
        "ALIGNED": variant.aligned,
        "SKIP_NONFINITE": "SKIP_NONFINITE" in variant.conditions,
        "BLOCK_SIZE": config.block_size,
        "TAIL_SIZE": TAIL_SIZE if COMPILED and variant.has_formats else config.block_size,
        "BLOCKS": config.blocks,
        "NUM_STAGES": config.num_stages,
        "EVICTION": config.eviction,
    }


def _format(name: str) -> int:
    number: int = getattr(formats, name.upper()).value
    return number


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
        elif variant.n_states == 1 and variant.conditions and not variant.aligned:
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
    return values + [0] * (ROW_WIDTH - len(values))


def check_interpreter(triton_version: str, numpy_version: str) -> None:
    """Warn of a pair whose interpreter fails in kernels with loops."""
    of_triton, of_numpy = (
        tuple(map(int, version.split(".")[:2])) for version in (triton_version, numpy_version)
    )
    if of_triton < (3, 7) and of_numpy >= (2, 4):
        warnings.warn(
            f"the interpreter of Triton {triton_version} fails with numpy {numpy_version}: only "
            "0-dimensional arrays can be converted to Python scalars; install numpy<2.4, or Triton "
            "3.7 or newer",
            stacklevel=2,
        )


if DEVICE_TYPE == "cpu":
    import numpy as np

    check_interpreter(triton.__version__, np.__version__)
