"""How steps are sampled. No time is asserted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from fake_device import FakeDevice
from lab.rows import COPIES, COPY
from lab.timing import FEWEST_REPEATS, Summary, in_turn, measure


def test_summary() -> None:
    assert Summary.of([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (2.5, 1.0, 4.0)
    assert Summary.of([7.0, 7.0]) == (7.0, 7.0, 7.0)


def test_every_sample_finds_renewed_tensors() -> None:
    calls: list[str] = []
    steps = {name: partial(calls.append, name) for name in ("a", "b", COPY)}
    times = measure(FakeDevice(), steps, True, 3, math.inf, lambda: calls.append("renew"))
    assert [len(series.gpu) for series in times.values()] == [3, 3, 3]
    samples = "".join(name[0] for name in calls).split("r")
    assert [len({*sample}) for sample in samples] == [0] + [1] * (3 + 3 * 3)
    order = [sample[0] for sample in samples[4:]]
    assert order == [*"abc", *"bca", *"cab"]


def test_copies_find_the_l2_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    device = FakeDevice()
    monkeypatch.setattr(device, "empty_l2", lambda: calls.append("emptied"))
    steps = {name: partial(calls.append, name) for name in ("a", *COPIES)}
    measure(device, steps, True, 3, math.inf)
    followed = {after for call, after in pairwise(calls) if call == "emptied"}
    assert followed == {"a"}


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_what_runs_out_of_memory_while_it_is_timed(steps: int) -> None:
    """The others go on; where nothing is left, nothing is measured."""
    left = [steps]

    def growing() -> None:
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left[0] -= 1

    times = measure(FakeDevice(), {"growing": growing, "a": lambda: None}, False, 3, math.inf)
    assert {name: len(series.gpu) for name, series in times.items()} == {"a": 3}
    assert not measure(FakeDevice(), {"growing": growing}, False, 3, math.inf)
    assert not measure(FakeDevice(), {}, False, 3, math.inf)


@pytest.mark.parametrize(("seconds", "repeats"), [(math.inf, 5), (-1.0, FEWEST_REPEATS)])
def test_one_step_of_each_in_turn(seconds: float, repeats: int) -> None:
    """A new one every time, as often as the time allows, and the fewest times that there are."""
    calls: list[str] = []

    def prepared(name: str) -> Callable[[], None]:
        calls.append(name)
        return lambda: calls.append(name.upper())

    prepare = {name: partial(prepared, name) for name in "ab"}
    series = in_turn(prepare, 5, warmup=2, seconds=seconds)
    assert {name: len(times) for name, times in series.items()} == dict.fromkeys("ab", repeats)
    assert "".join(calls) == "aAbB" * (2 + repeats)
