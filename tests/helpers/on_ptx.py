"""What a test run sets up to execute the compiled kernels' PTX: see tests/ptx/README.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import triton
from guarded_memory import guarded_buffers
from lab import traffic
from ptx_machine.access import Access
from ptx_machine.driver import Machine, all_tensors, install, settle
from ptx_machine.floats import Array
from ptx_machine.global_memory import Spans
from ptx_machine.grid import Run
from sanitizer import Sanitizer

from triton_optim.launch import backend

__all__ = ["machine", "sanitized", "settle", "start", "watched"]


def machine() -> Machine:
    """That which runs the launches of this process."""
    active: Machine = triton.runtime.driver.active
    return active


def start(architecture: str) -> None:
    """Parameters on the CPU are a GPU's from now on, and `lab.traffic` watches this machine."""
    install(architecture).spans = _between_guards
    vars(backend)["DEVICE_TYPE"] = "cpu"
    vars(backend)["architecture"] = lambda _: architecture
    vars(traffic)["watched"] = watched


@contextmanager
def watched(watch: Callable[[traffic.Access], None]) -> Iterator[None]:
    """Call `watch` before every load and store, as in the interpreter; of equal ones, once."""

    def watcher(access: Access) -> None:
        if access.kind != "atomic":
            places = np.unique(access.addresses)
            watch(traffic.Access(access.kind == "store", places, access.size))

    gpu = machine()
    gpu.watchers.append(watcher)
    try:
        yield
    finally:
        gpu.watchers.remove(watcher)


def _between_guards() -> tuple[Spans, Spans]:
    spans = all_tensors().without(
        margin
        for buffer in guarded_buffers
        for start in (buffer.memory.data_ptr(),)
        for margin in (
            (start, start + buffer.start),
            (start + buffer.stop, start + buffer.memory.nbytes),
        )
    )
    return spans, spans


@contextmanager
def sanitized(sanitizer: Sanitizer) -> Iterator[None]:
    """Launches of a step access what the sanitizer says, and it sees every store."""

    def spans() -> tuple[Spans, Spans]:
        known = sanitizer.spans
        return (Spans(known[0]), Spans(known[1])) if known else _between_guards()

    def stored(run: Run) -> None:
        by_size: dict[int, list[Array]] = defaultdict(list)
        for access in run.memory.log:
            if access.kind == "store":
                by_size[access.size].append(access.addresses)
        for size, addresses in by_size.items():
            sanitizer.watch(traffic.Access(True, np.concatenate(addresses), size))

    gpu = machine()
    gpu.spans = spans
    gpu.after.append(stored)
    try:
        yield
    finally:
        gpu.spans = _between_guards
        gpu.after.remove(stored)
