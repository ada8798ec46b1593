"""Steps of small tensors by every implementation, and how their host time is measured."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch.nn import Parameter

from lab import implementations
from lab.host_rows import CHANGING, DTENSOR, FIRST, FLOOR, FRESH, PLAIN, STAY, TORCH, Row
from lab.host_tensors import half, new_gradients, parameters, reading_addresses
from lab.implementations import OURS, STORAGES, Implementation, Rule
from lab.machine import processor_and_threads
from lab.timing import FEWEST_REPEATS, Summary

Work = Callable[[], object]
Key = tuple[int, str]  # the number of groups, and the implementation

RULES = {rule.name: rule for rule in implementations.RULES}
NAMES = {OURS: OURS, **{f"torch {name}": name for name in TORCH}}
GROUPS = (1, 20)  # the latter for fresh gradients of plain tensors alone
WARMUP = 1
# torch has no fused step of DTensors. A foreach step of n of them propagates their shardings when
# torch first sees n of these shapes, which takes time that grows faster than n.
MOST_DTENSORS = {"fused": 0, "foreach": 300}


class Case(NamedTuple):
    """What is stepped."""

    rule: str
    tensors: int
    params: str
    gradients: str

    def row(self, implementation: str, times: list[float], groups: int = 1) -> Row:
        columns = self.rule, self.params, self.tensors, groups, self.gradients, implementation
        if len(times) == 1:
            return Row(machine(), *columns, 1, *(3 * times))
        return Row(machine(), *columns, len(times), *Summary.of(times))


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    return f"{processor_and_threads()}, {device}, {versions}, Python {platform.python_version()}"


def measure(case: Case, repeats: int, seconds: float) -> list[Row]:
    """Everything that steps these tensors, in turn.

    Args:
        case: what is stepped.
        repeats: how often, at the most.
        seconds: after which no further repeat begins, but for the fewest that there are.
    """
    params = parameters(case.tensors, case.params)
    new_gradients(params, params)
    several = GROUPS if (case.params, case.gradients) == (PLAIN, FRESH) else GROUPS[:1]
    builds = {
        (groups, name): build
        for groups in several
        if case.tensors >= 5 * groups
        for name, build in _builds(case, params, groups).items()
    }
    steps = {} if case.gradients == FIRST else {key: build() for key, build in builds.items()}
    for step in steps.values():
        step()  # with all gradients: state is made, and kernels are compiled
    series: dict[Key, list[float]] = {key: [] for key in builds}
    drawn, stop = random.Random(0), time.monotonic() + seconds
    for repeat in range(WARMUP + repeats):
        if repeat >= WARMUP + FEWEST_REPEATS and time.monotonic() > stop:
            break
        for key, build in builds.items():
            if case.gradients != STAY:
                chosen = half(params, drawn) if case.gradients == CHANGING else params
                new_gradients(params, chosen)
            elapsed = microseconds(steps[key] if steps else build())
            if repeat >= WARMUP:
                series[key].append(elapsed)
    return [case.row(name, times, groups) for (groups, name), times in series.items()]


def microseconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - start)


def _builds(case: Case, params: Sequence[Parameter], groups: int) -> dict[str, Callable[[], Work]]:
    """What makes the floor, and an optimizer's step of every implementation that there is."""
    rule = RULES[case.rule]._replace(kwargs={**RULES[case.rule].kwargs, "lr": 1e-6})
    builds: dict[str, Callable[[], Work]] = {FLOOR: partial(reading_addresses, params, case.params)}
    for implementation in implementations.IMPLEMENTATIONS:
        name = NAMES.get(implementation.name)
        if name is None or implementation.refusal(rule, STORAGES[0]) is not None:
            continue
        if case.params == DTENSOR and case.tensors > MOST_DTENSORS.get(name, case.tensors):
            continue
        builds[name] = partial(new_step, implementation, rule, params, groups)
    return builds


def new_step(
    implementation: Implementation, rule: Rule, params: Sequence[Parameter], groups: int = 1
) -> Work:
    """The step of a new optimizer."""
    parts: Any = [{"params": params[i::groups]} for i in range(groups)]
    step: Work = implementation.build(rule, parts).step
    return step
