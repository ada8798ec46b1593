"""Fixtures. Without a GPU the kernels run in Triton's interpreter, which must be said first.

Or as compiled: PTX=sm_90 in the environment executes the PTX of their compilation for sm_90.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
if not torch.cuda.is_available() and "PTX" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
# What cuBLAS needs under the deterministic algorithms that fill fresh memory with NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import guarded_memory
from fake_graph import fake_cuda

from triton_optim.launch import backend, row_launcher, tuning
from triton_optim.launch.launcher import Launch, UpdateLaunch
from triton_optim.launch.variant import Variant
from triton_optim.step.launch_group import LaunchGroup
from triton_optim.step.plan import Plan

PTX = os.environ.get("PTX")
# Files that take longest begin first, so that all processes end at about the same time.
SLOWEST = ("test_audit", "test_distributed", "test_programs", "test_rules", "test_gpu_report",
           "test_interruptions", "test_check", "test_conformance", "test_train_lm", "test_fuzz",
           "test_plan", "test_text_classifier", "test_integration", "test_packaging")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # to begin with the files of most tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto`: a process a core, but no workers, just this process, where there is a GPU."""
    return 0 if torch.cuda.is_available() else None


if PTX:
    import on_ptx

    on_ptx.start(PTX)
elif not backend.COMPILED:
    from triton_optim.testing.interpreter import speed_up

    speed_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skipped = {
        "gpu": None if torch.cuda.is_available() else "needs a GPU",
        "ptx": None if PTX else "needs PTX=sm_90, or another architecture, in the environment",
        "interpreted": "is about Triton's interpreter" if backend.COMPILED else None,
    }
    items.sort(key=lambda item: item.path.stem not in SLOWEST)
    for item in items:
        for name, reason in skipped.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor without large tensors: see cases.BLOCK."""
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (64,))
    monkeypatch.setattr(row_launcher, "INTERPRETED_ELEMENTS", 64)
    monkeypatch.setattr(tuning, "PROGRAMS", 4)
    monkeypatch.setattr(tuning, "MAX_ROW_BLOCKS", 2)


@pytest.fixture(autouse=True, scope="module")
def _few_objects() -> None:
    """Where compiled kernels are executed, all tensors are looked for among all objects."""
    if PTX:
        on_ptx.settle()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written beside a tensor: see guarded_memory.py."""
    for name in guarded_memory.ALLOCATIONS:
        monkeypatch.setattr(torch, name, guarded_memory.guarding(getattr(torch, name)))
    yield
    broken = guarded_memory.pop_damaged()
    assert not broken


@pytest.fixture(autouse=True)
def _sanitizer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every load and store is within bounds, but on a GPU: see sanitizer.py."""
    if torch.cuda.is_available():
        yield
        return
    from lab.traffic import watched
    from sanitizer import Sanitizer

    sanitizer = Sanitizer()
    update = LaunchGroup.update
    monkeypatch.setattr(
        LaunchGroup, "update", lambda table, *args: sanitizer.update(update, table, *args)
    )
    launch = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, **more: sanitizer.launch(launch, self, more))
    with on_ptx.sanitized(sanitizer) if PTX else watched(sanitizer.watch):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The variant of every update launch of the test, in order."""
    seen: list[Variant] = []
    run = Launch.run

    def recorded(launch: Launch, **changed: torch.Tensor) -> None:
        if isinstance(launch, UpdateLaunch):
            seen.append(launch.variant)
        run(launch, **changed)

    monkeypatch.setattr(Launch, "run", recorded)
    return seen


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that is made."""
    made: list[Plan] = []
    init = Plan.__init__

    def recording(self: Plan, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(Plan, "__init__", recording)
    return made


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA graphs on the CPU."""
    with fake_cuda(monkeypatch):
        yield
