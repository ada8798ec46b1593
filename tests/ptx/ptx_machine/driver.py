"""A GPU for Triton that is this machine: tensors on the CPU are its memory."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel

from .access import Access, Fault
from .global_memory import Span, Spans
from .grid import Launch, Run
from .parser import UnknownPTX
from .program import Code

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a program
THREADS = 1024  # of a program, at most


class PTXBackend(CUDABackend):  # type: ignore[misc]
    """Triton's, which stops at PTX, and keeps it apart in Triton's cache."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *args: Any) -> None:
        super().add_stages(stages, *args)
        del stages["cubin"]

    def hash(self) -> str:
        return f"PTX alone, {super().hash()}"


class Machine:
    """What Triton asks of a driver.

    Args:
        architecture: such as "sm_90".

    Attributes:
        spans: what a launch may load, and what it may store to; by default all tensors.
        watchers: called with every access of a launch, in the first order of its programs.
        before: called with every launch before it runs.
        after: called with what came of every launch.
    """

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.spans: Callable[[], tuple[Spans, Spans]] = lambda: (all_tensors(),) * 2
        self.watchers: list[Callable[[Access], None]] = []
        self.before: Callable[[Launch], object] | None = None
        self.after: list[Callable[[Run], object]] = []
        self.n_launches = 0
        self.utils = SimpleNamespace(
            unload_module=lambda _: None,
            load_binary=self._load,
            get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY[architecture]},
        )

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def _load(self, _name: str, text: bytes, *_: Any) -> tuple[Any, ...]:
        """The module, the function, registers, spills and, of later Tritons, the most threads."""
        code = Code(text.decode())
        values = ("module", code, 0, 0, THREADS)
        has_threads = "n_max_threads" in inspect.getsource(CompiledKernel)
        return values if has_threads else values[:4]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a kernel of this source."""
        if metadata.num_ctas != 1 or metadata.global_scratch_size:
            raise UnknownPTX("clusters of programs, or scratch memory")
        kinds = [*source.signature.values()]

        def start(x: int, y: int, z: int, _stream: int, code: Code, *rest: Any) -> None:
            _packed, launch_metadata, _enter, _leave, *arguments = rest
            if hasattr(launch_metadata, "get"):
                launch_metadata.get()
            given = [a for a, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
            if code.kernel.n_threads != 32 * metadata.num_warps:
                raise UnknownPTX(f"{code.kernel.n_threads} threads in {metadata.num_warps} warps")
            self._launch(code, (x, y, z), given, metadata.shared)

        return start

    def _watch(self, access: Access) -> None:
        for watcher in self.watchers:
            watcher(access)

    def _launch(
        self, code: Code, grid: tuple[int, int, int], given: list[Any], shared_bytes: int
    ) -> None:
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
        values += [0] * (len(code.kernel.params) - len(values))  # to scratch memory of no bytes
        self.n_launches += 1
        launch = Launch(code, grid, values, shared_bytes, *self.spans(), seed=self.n_launches)
        if self.before is not None:
            self.before(launch)
        try:
            run = launch.run(self._watch)
        except Fault as fault:
            raise Fault(f"{code.kernel.name}: {fault}") from None
        for listener in self.after:
            listener(run)


def all_tensors() -> Spans:
    """The memory of all tensors of this process."""
    return Spans(_settled | _of_tensors())


def settle() -> None:
    """Take the tensors of now for ones that stay: `all_tensors` looks at later ones alone."""
    gc.collect()
    _settled.update(_of_tensors())
    gc.freeze()


_settled: set[Span] = set()


def _of_tensors() -> set[Span]:
    found: set[Span] = set()
    for thing in gc.get_objects():
        plain = type(thing) in (torch.Tensor, torch.nn.Parameter)
        if plain and thing.is_cpu and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return found


def install(architecture: str) -> Machine:
    """From now on Triton compiles for this architecture, and its launches run here."""
    machine = Machine(architecture)
    backends = triton.backends.backends
    backends["nvidia"] = type(backends["nvidia"])(PTXBackend, backends["nvidia"].driver)
    triton.runtime.driver.set_active(machine)
    return machine
