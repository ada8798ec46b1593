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
    wall: list[float]
    host: list[float]
    gaps: list[bool]  # whether the device may have waited for the host


class _Course(NamedTuple):
    """How one implementation is sampled."""

    step: Step
    n_steps: int
    hold_us: float


def measure(
    device: Device,
    steps: Mapping[str, Step],
    empty_l2: bool,
    repeats: int,
    stop: float,
    renew: Step | None = None,
) -> dict[str, Times]:
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
    renew = renew or _nothing
    times = {name: Times([], [], [], []) for name in steps}
    courses: dict[str, _Course] = {}
    for name, step in steps.items():
        with _dropped_without_memory(times, name):
            courses[name] = _course(device, step, renew)
    for repeat in range(repeats):
        if not times or (repeat >= FEWEST_REPEATS and time.monotonic() > stop):
            break
        names = list(times)
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            empty = empty_l2 and name not in COPIES
            with _dropped_without_memory(times, name):
                renew()
                gpu, gaps = _gpu_sample(device, courses[name], empty)
                wall, host = _wall_sample(device, courses[name], empty)
                times[name].gpu.append(gpu)
                times[name].wall.append(wall)
                times[name].host.append(host)
                times[name].gaps.append(gaps)
    return times


@contextmanager
def _dropped_without_memory(times: dict[str, Times], name: str) -> Iterator[None]:
    """Goes on without an implementation for which memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        del times[name]


def _nothing() -> None:
    pass


def _course(device: Device, step: Step, renew: Step) -> _Course:
    once = _Course(step, 1, 0.0)
    renew()
    _wall_sample(device, once, False)
    wall, host = _wall_sample(device, once, False)
    n_steps = max(1, min(MAX_STEPS, int(SAMPLE_US / wall)))
    # Twice the time that queueing takes, and some for what lies between the steps.
    hold = 2 * (n_steps + 1) * (host + 20) + 100
    return _Course(step, n_steps, min(MAX_HOLD_US, hold))


def _gpu_sample(device: Device, course: _Course, empty_l2: bool) -> tuple[float, bool]:
    """The device's mean time of a step, of several queued together behind a hold.

    A first one is not timed: like all others, those that are timed find the L2 as a step left it,
    or empty.
    """
    device.synchronize()
    device.hold(course.hold_us)
    held = device.mark()
    course.step()
    spans = []
    for _ in range(course.n_steps):
        if empty_l2:
            device.empty_l2()
        start = device.mark()
        course.step()
        spans.append((start, device.mark()))
    gaps = device.passed(held)
    device.synchronize()
    return statistics.fmean(device.between(*span) for span in spans), gaps


def _wall_sample(device: Device, course: _Course, empty_l2: bool) -> tuple[float, float]:
    """Mean microseconds from the call of a step until the device is done, and until it returns.

    The device is idle at the call.
    """
    walls, hosts = [], []
    for _ in range(course.n_steps):
        if empty_l2:
            device.empty_l2()
        device.synchronize()
        start = time.perf_counter()
        course.step()
        returned = time.perf_counter()
        device.synchronize()
        walls.append(1e6 * (time.perf_counter() - start))
        hosts.append(1e6 * (returned - start))
    return statistics.fmean(walls), statistics.fmean(hosts)
