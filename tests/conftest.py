"""Fixtures. Without a GPU the kernels run in Triton's interpreter, which must be said first."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from triton_optim import runtime


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor without large tensors: see cases.BLOCK."""
    monkeypatch.setattr(runtime, "INTERPRETED_BLOCK_SIZES", (64,))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[runtime.Variant]:
    """The variant of every update launch of the test, in order."""
    seen: list[runtime.Variant] = []
    launch = runtime.launch

    def recorded(rule: str, variant: runtime.Variant, *args: object) -> None:
        seen.append(variant)
        launch(rule, variant, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime, "launch", recorded)
    return seen
