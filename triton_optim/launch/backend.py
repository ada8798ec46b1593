"""Triton's side of the house: where the kernels run on this machine, and what they are made of."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from ..tensors.float8 import GROUP_SIZE
from . import tuning
from .tuning import Config
from .variant import ITEM_SIZES, Variant


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

CAPTURABLE_DEVICE_TYPES = frozenset({"cuda"})  # where there are CUDA graphs, or HIP's

_CURRENT: AbstractContextManager[object] = nullcontext()

ALIGNMENT = 16  # bytes: a 128-bit load

# An interpreted program costs about as much as 40,000 of its elements.
INTERPRETED_BLOCK_SIZES = tuple(1 << k for k in range(10, 19))
INTERPRETED_OVERHEAD = 40_000


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


def format_number(name: str) -> int:
    """Of a format, in kernels."""
    number: int = getattr(formats, name.upper()).value
    return number


def flag_bits(names: Iterable[str]) -> int:
    """Flags as kernels are given them."""
    return sum(flags.BITS[name] for name in names)


def flag_names() -> Collection[str] | None:
    """Of all flags that were made; None where there is no Triton."""
    return flags.BITS.keys() if DEVICE_TYPE else None


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
