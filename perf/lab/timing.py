"""How steps are timed: device time, wall time and host time, all implementations in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from lab.device import Device
from lab.implementations import Step
from lab.rows import COPIES

Key = TypeVar("Key")

SAMPLE_US = 2000.0  # one sample is about this long, and at most MAX_STEPS steps
MAX_STEPS = 10
MAX_HOLD_US = 200_000.0
FEWEST_REPEATS = 3  # even where time runs out


class Summary(NamedTuple):
    """Median and 20th to 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, series: list[float]) -> Summary:
        low, *_, high = statistics.quantiles(series, n=5, method="inclusive")
        return cls(statistics.median(series), low, high)


def in_turn(
    prepare: Mapping[Key, Callable[[], Step]],
    repeats: int,
    *,
    warmup: int = 0,
    seconds: float = math.inf,
) -> dict[Key, list[float]]:
    """The host's microseconds of one step of each, in turn.

    Args:
        prepare: make a step; that is not timed.
        repeats: how often, at the most.
        warmup: repeats before them.
        seconds: after which no further repeat begins, but for the fewest that there are.
    """
    series: dict[Key, list[float]] = {key: [] for key in prepare}
    stop = time.monotonic() + seconds
    for repeat in range(warmup + repeats):
        if repeat >= warmup + FEWEST_REPEATS and time.monotonic() > stop:
            break
        for key, prepared in prepare.items():
            step = prepared()
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if repeat >= warmup:
                series[key].append(1e6 * elapsed)
    return series


class Times(NamedTuple):
    """Microseconds a step, a value a repeat."""

    gpu: list[float]
    gaps: list[bool]  # whether the device may have waited for the host
    wall: list[float]
    host: list[float]


class _Course(NamedTuple):
    """How one implementation is sampled."""

    device: Device
    step: Step
    empty_l2: bool
    n_steps: int = 1
    hold_us: float = 0.0

    def sized(self) -> _Course:
        """With as many steps as a sample has, and the hold that they need."""
        self.wall_sample()
        wall, host = self.wall_sample()
        n_steps = max(1, min(MAX_STEPS, int(SAMPLE_US / wall)))
        # Twice the time that queueing takes, and some for what lies between the steps.
        hold = 2 * (n_steps + 1) * (host + 20) + 100
        return self._replace(n_steps=n_steps, hold_us=min(MAX_HOLD_US, hold))

    def gpu_sample(self) -> tuple[float, bool]:
        """The device's mean time of a step, of several queued together behind a hold.

        A first one is not timed: like all others, those that are timed find the L2 as a step left
        it, or empty.
        """
        device = self.device
        device.synchronize()
        device.hold(self.hold_us)
        held = device.mark()
        self.step()
        spans = []
        for _ in range(self.n_steps):
            if self.empty_l2:
                device.empty_l2()
            start = device.mark()
            self.step()
            spans.append((start, device.mark()))
        gaps = device.passed(held)
        device.synchronize()
        return statistics.fmean(device.between(*span) for span in spans), gaps

    def wall_sample(self) -> tuple[float, float]:
        """Mean microseconds from the call of a step until the device is done, and until it returns.

        The device is idle at the call.
        """
        walls, hosts = [], []
        for _ in range(self.n_steps):
            if self.empty_l2:
                self.device.empty_l2()
            self.device.synchronize()
            start = time.perf_counter()
            self.step()
            hosts.append(1e6 * (time.perf_counter() - start))
            self.device.synchronize()
            walls.append(1e6 * (time.perf_counter() - start))
        return statistics.fmean(walls), statistics.fmean(hosts)


def measure(
    device: Device, steps: Mapping[str, Step], empty_l2: bool, repeats: int, stop: float,
    renew: Step = lambda: None,
) -> dict[str, Times]:  # fmt: skip
    """Time all steps in turn, another one first in every repeat.

    Args:
        device: where they run.
        steps: by name. Each has run before.
        empty_l2: whether to empty the L2 before every step, except for copies.
        repeats: how often, at the most.
        stop: the `time.monotonic()` after which no further repeat begins.
        renew: called before each sample, untimed.

    Returns:
        By name; without those for which memory ran out.
    """
    times = {name: Times([], [], [], []) for name in steps}
    courses: dict[str, _Course] = {}
    for name, step in steps.items():
        with _dropped_without_memory(times, name):
            renew()
            courses[name] = _Course(device, step, False).sized()
    for repeat in range(repeats):
        if not times or (repeat >= FEWEST_REPEATS and time.monotonic() > stop):
            break
        names = list(times)
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            course = courses[name]._replace(empty_l2=empty_l2 and name not in COPIES)
            with _dropped_without_memory(times, name):
                renew()
                sample = (*course.gpu_sample(), *course.wall_sample())
                for series, value in zip(times[name], sample, strict=True):
                    series.append(value)  # type: ignore[attr-defined]
    return times


@contextmanager
def _dropped_without_memory(times: dict[str, Times], name: str) -> Iterator[None]:
    """Goes on without an implementation for which memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        del times[name]
