"""A CUDA graph on the CPU: what torch and the kernels do under capture is recorded, and replayed.

As with a real one, a capture changes nothing, and a replay uses the memory that was captured and
the numbers that the host had then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_optim.launch import backend
from triton_optim.launch.launcher import Launch
from triton_optim.tensors import layout


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], object]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for operation in self.operations:
                operation()


class _Recorder(TorchDispatchMode):
    """Runs and records operations; `undo` takes back what they changed."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._before.setdefault(id(tensor), (tensor, tensor.clone()))

    def undo(self) -> None:
        for tensor, value in self._before.values():
            tensor.copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            with torch._C._DisableTorchDispatch():
                written = args[0] if isinstance(args[0], list) else [args[0]]
                self.keep([tensor.detach() for tensor in written])
        out = func(*args, **kwargs)

        def again() -> None:
            new = func(*args, **kwargs)
            if isinstance(out, Tensor) and new.data_ptr() != out.data_ptr():
                out.copy_(new)

        self._graph.operations.append(again)
        return out


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.cuda.graph` and `CUDAGraph` capture what happens on the CPU."""
    capturing: list[_Recorder] = []

    @contextmanager
    def graph(graph: FakeGraph) -> Iterator[None]:
        recorder = _Recorder(graph)
        capturing.append(recorder)
        try:
            with recorder:
                yield
        finally:
            capturing.clear()
            with torch.no_grad():
                recorder.undo()

    run = Launch.run

    def record(launch: Launch, **changed: Tensor) -> None:
        if not capturing:
            return run(launch, **changed)
        capturing[0]._graph.operations.append(lambda: run(launch, **changed))
        return None

    # torch's guard compares the dispatch mode too, which is how this graph records.
    patch.setattr(layout, "TensorGuards", None)
    patch.setattr(backend, "CAPTURABLE_DEVICE_TYPES", frozenset({"cpu"}))
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    patch.setattr(backend, "captures_pinned_memory", lambda: True)
    patch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    patch.setattr(torch.cuda, "graph", graph)
    patch.setattr(Launch, "run", record)
    yield
