"""A GPU that is not there: kernels are compiled for it as on a real one, and launches recorded.

Shows without a GPU what is compiled and when, and what a launch is given. Parameters are on a CPU.
Only without TRITON_INTERPRET.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from triton_optim.kernels.keys import keys_kernel
from triton_optim.kernels.multi_tensor import multi_tensor_kernel
from triton_optim.kernels.rows import rows_kernel
from triton_optim.launch import backend

KERNELS = (multi_tensor_kernel, keys_kernel, rows_kernel)
SHARED_MEMORY = 227 * 1024  # bytes a program can have on sm_90


class DryGPU:
    """What Triton asks of a driver.

    Attributes:
        launches: the arguments of every launch, as Triton's launcher gets them: grid, stream,
            function, packed metadata, launch metadata, two hooks, and the kernel's own.
    """

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            unload_module=lambda _: None,
            load_binary=self._load_binary,
            get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY},
        )

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *args: self.launches.append(args)

    def _load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        values = ("module", name, 0, 0, 1024)  # registers, spills, threads a program may have
        has_threads = "n_max_threads" in inspect.getsource(CompiledKernel)
        return values if has_threads else values[:4]

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def n_compiled(self) -> int:
        """Kernels compiled, or loaded from Triton's cache, until now."""
        caches = (kernel.device_caches.values() for kernel in KERNELS)
        return sum(len(cache[0]) for cache in chain.from_iterable(caches))


@contextmanager
def dry_gpu(architecture: str = "sm_90") -> Iterator[DryGPU]:
    """Parameters on the CPU are taken for a GPU's meanwhile.

    Triton keeps the driver afterwards: without a GPU it has no other.
    """
    gpu = DryGPU(architecture)
    triton.runtime.driver.set_active(gpu)
    named = patch.object(backend, "architecture", lambda _: architecture)
    with patch.object(backend, "DEVICE_TYPE", "cpu"), named:
        yield gpu
