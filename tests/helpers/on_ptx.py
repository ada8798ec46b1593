"""What a test run sets up to execute the compiled kernels' PTX: see tests/ptx/README.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from guarded_memory import guarded_buffers
from lab import traffic
from ptx_machine.access import Access
from ptx_machine.driver import Machine, all_tensors, install
from ptx_machine.global_memory import Spans
from sanitizer import Sanitizer

from triton_optim.launch import backend


def start(architecture: str) -> Machine:
    """Parameters on the CPU are a GPU's from now on."""
    machine = install(architecture)
    vars(backend)["DEVICE_TYPE"] = "cpu"
    vars(backend)["architecture"] = lambda _: architecture
    machine.spans = _between_guards
    return machine


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
def watched(machine: Machine, sanitizer: Sanitizer) -> Iterator[None]:
    """Launches of a step access what the sanitizer says, and it sees every access."""

    def spans() -> tuple[Spans, Spans]:
        known = sanitizer.spans
        return (Spans(known[0]), Spans(known[1])) if known else _between_guards()

    def watch(access: Access) -> None:
        if access.kind != "atomic":
            stores = access.kind == "store"
            sanitizer.watch(traffic.Access(stores, access.addresses, access.size))

    machine.spans, machine.watch = spans, watch
    try:
        yield
    finally:
        machine.spans, machine.watch = _between_guards, None
