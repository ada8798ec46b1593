"""Triton's side of the house: where the kernels run on this machine, and how one is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .tuning import Config

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

ITEM_SIZES = {n: d.itemsize for d, n in STORAGE_DTYPES.items() if not d.is_complex}  # bytes

ALIGNMENT = 16  # bytes: a 128-bit load

# Left alone, ptxas squeezes kernels of two states into 64 registers, where some spill.
TWO_STATES_REGISTERS = 80
TWO_STATES_ELEMENTS = 256  # that a warp holds at once; with more, or in a loop, these are too few

# An interpreted program costs about as much as 40,000 of its elements.
INTERPRETED_BLOCK_SIZES = tuple(1 << k for k in range(10, 19))
INTERPRETED_OVERHEAD = 40_000


class Variant(NamedTuple):
    """What a compiled kernel depends on: never a size, a count, a rate or a step."""

    flags: frozenset[str]
    n_states: int
    param_dtype: str
    grad_dtype: str
    state_dtype: str  # the parameter's where there is no state
    aligned: bool
    reads_step: bool

    @property
    def bytes_per_element(self) -> int:
        """The gradient read once, parameter and state read once and written once."""
        states = self.n_states * ITEM_SIZES[self.state_dtype]
        return 2 * ITEM_SIZES[self.param_dtype] + ITEM_SIZES[self.grad_dtype] + 2 * states

    @property
    def half(self) -> bool:
        """Whether everything that is updated is of 16 bits."""
        dtypes = (self.param_dtype, self.grad_dtype, self.state_dtype)
        return all(ITEM_SIZES[dtype] == 2 for dtype in dtypes)


class Tables(NamedTuple):
    """What a launch reads, all on the parameters' device."""

    rows: Tensor  # int64 [tensors, ROW_WIDTH]
    grads: Tensor  # int64 [tensors]
    hypers: Tensor  # float64 [groups, hyperparameters]
    steps: Tensor | None  # floating [tensors]


def config(variant: Variant, numels: Iterable[int], device: torch.device) -> Config:
    """How a launch over tensors of these numbers of elements is cut into programs."""
    if COMPILED:
        return tuning.config(architecture(device), half=variant.half)
    numels = list(numels)
    size = min(
        INTERPRETED_BLOCK_SIZES,
        key=lambda size: (INTERPRETED_OVERHEAD + size) * sum(-(-n // size) for n in numels),
    )
    return Config(size, num_warps=1)


@cache
def architecture(device: torch.device) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def constants(rule: str, variant: Variant, config: Config, n_hypers: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, by name."""
    return {
        "RULE": getattr(rules, rule),
        "FLAGS": sum(getattr(rules, flag).value for flag in variant.flags),
        "N_HYPERS": n_hypers,
        "N_STATES": variant.n_states,
        "PARAM_DTYPE": getattr(tl, variant.param_dtype),
        "GRAD_DTYPE": getattr(tl, variant.grad_dtype),
        "STATE_DTYPE": getattr(tl, variant.state_dtype),
        "ALIGNED": variant.aligned,
        "BLOCK_SIZE": config.block_size,
        "BLOCKS": config.blocks,
        "NUM_STAGES": config.num_stages,
        "EVICTION": config.eviction,
    }


def options(variant: Variant, config: Config, architecture: str) -> dict[str, Any]:
    """The compiler's options, by name."""
    chosen = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    elements = config.block_size // config.num_warps
    if (
        architecture.startswith("sm_")
        and variant.n_states == 2
        and variant.param_dtype != "float64"
        and elements <= TWO_STATES_ELEMENTS
        and config.blocks == 1
    ):
        chosen["maxnreg"] = TWO_STATES_REGISTERS
    return chosen


class Launch:
    """One update launch: compiled and bound to its tables when it is made, run at every step.

    A compiled kernel is called directly: Triton's launcher would look it up by all its arguments.

    Args:
        rule: its name in kernels/rules.py.
        variant: what the kernel is compiled for.
        config: how the launch is cut into programs.
        owners: int32, one a program: the row of its tensor.
        tables: on the device of `owners`.
        n_bytes: what the launch loads and stores of the tensors.
    """

    def __init__(
        self,
        rule: str,
        variant: Variant,
        config: Config,
        owners: Tensor,
        tables: Tables,
        n_bytes: int,
    ) -> None:
        self.variant, self.owners, self.tables = variant, owners, tables
        self.grid = (len(owners), 1, 1)
        self.arguments = {
            "owners_ptr": owners,
            "rows_ptr": tables.rows,
            "grads_ptr": tables.grads,
            "hypers_ptr": tables.hypers,
            "steps_ptr": tables.steps if variant.reads_step else None,
            "n_bytes": float(n_bytes),
            **constants(rule, variant, config, tables.hypers.shape[1]),
        }
        self.options = options(variant, config, architecture(owners.device)) if COMPILED else {}
        self._start = self._bound()

    def _bound(self) -> Callable[[], object]:
        kernel = multi_tensor.multi_tensor_kernel
        if not COMPILED:
            return partial(kernel[self.grid], **self.arguments)
        with _current(self.owners.device):
            compiled = kernel.warmup(**self.arguments, **self.options, grid=self.grid)
            start = compiled[self.grid]
        # Addresses: Triton would ask the driver whose memory a tensor's is, at every launch.
        values = (self.arguments[name] for name in kernel.arg_names)
        return partial(start, *(v.data_ptr() if isinstance(v, Tensor) else v for v in values))

    def run(self) -> None:
        """Launch on the device's current stream."""
        with _current(self.owners.device):
            self._start()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that are run meanwhile, for tools and tests."""
    launches: list[Launch] = []
    run = Launch.run

    def record(launch: Launch) -> None:
        launches.append(launch)
        run(launch)

    Launch.run = record  # type: ignore[assignment, method-assign]
    try:
        yield launches
    finally:
        Launch.run = run  # type: ignore[method-assign]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, which Triton launches on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def row(numel: int, group: int, first: int, addresses: Sequence[int]) -> list[int]:
    """A row of the tensor table.

    Args:
        numel: elements.
        group: its row of hyperparameters.
        first: the first of its programs.
        addresses: the parameter's, then one a state.
    """
    values = [numel, group, first, *addresses]
    return values + [0] * (ROW_WIDTH - len(values))
