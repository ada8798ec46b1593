"""Steps of small tensors by every implementation, and how their host time is measured."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

import triton_optim
from lab import machine, rules
from lab.dry_gpu import dry_gpu
from lab.host_rows import (
    CHANGING,
    COLD,
    DTENSOR,
    FIRST,
    FLOOR,
    FRESH,
    LAUNCHES,
    PLAIN,
    STAY,
    TORCH,
    Row,
)  # fmt: skip
from lab.host_tensors import half, new_gradients, one_process, parameters, reading_addresses
from lab.implementations import IMPLEMENTATIONS, Implementation, Step
from lab.rows import OURS
from lab.rules import STORAGES, Rule
from lab.timing import Summary, in_turn
from triton_optim.kernels.multi_tensor import multi_tensor_kernel

RULES = {rule.name: rule for rule in rules.RULES}
NAMES = {OURS: OURS, **{f"torch {name}": name for name in TORCH}}
STEPPED = {NAMES[item.name]: item for item in IMPLEMENTATIONS if item.name in NAMES}
GROUPS = (1, 20)  # the latter for fresh gradients of plain tensors alone
# torch has no fused step of DTensors. A foreach step of n of them propagates their shardings when
# torch first sees n of these shapes, which takes time that grows faster than n.
MOST_DTENSORS = {"fused": 0, "foreach": 300}
COLD_TENSORS = 100
N_LAUNCHES = 200


class Case(NamedTuple):
    """What is stepped."""

    rule: str
    tensors: int
    params: str
    gradients: str

    def row(self, implementation: str, times: list[float], groups: int = 1) -> Row:
        columns = self.rule, self.params, self.tensors, groups, self.gradients, implementation
        summary = Summary.of(times) if len(times) > 1 else 3 * times
        return Row(machine.in_one_line(), *columns, len(times), *summary)


def measure(case: Case, repeats: int, seconds: float) -> list[Row]:
    """Everything that steps these tensors, in turn.

    Args:
        case: what is stepped.
        repeats: how often, at the most.
        seconds: after which no further repeat begins, but for the fewest that there are.
    """
    params, drawn = _with_gradients(case.tensors, case.params), random.Random(0)
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

    def prepared(key: tuple[int, str]) -> Step:
        if case.gradients != STAY:
            new_gradients(params, half(params, drawn) if case.gradients == CHANGING else params)
        return steps[key] if steps else builds[key]()

    prepare = {key: partial(prepared, key) for key in builds}
    series = in_turn(prepare, repeats, warmup=1, seconds=seconds)
    return [case.row(name, times, groups) for (groups, name), times in series.items()]


def _with_gradients(tensors: int, kind: str) -> list[Parameter]:
    params = parameters(tensors, kind)
    new_gradients(params, params)
    return params


def _builds(case: Case, params: Sequence[Parameter], groups: int) -> dict[str, Callable[[], Step]]:
    """What makes the floor, and an optimizer's step of every implementation that there is."""
    rule = RULES[case.rule]._replace(kwargs={**RULES[case.rule].kwargs, "lr": 1e-6})
    builds: dict[str, Callable[[], Step]] = {FLOOR: partial(reading_addresses, params, case.params)}
    for name, item in STEPPED.items():
        too_many = case.params == DTENSOR and case.tensors > MOST_DTENSORS.get(name, case.tensors)
        if not too_many and item.refusal(rule, STORAGES[0]) is None:
            builds[name] = partial(new_step, item, rule, params, groups)
    return builds


def new_step(
    implementation: Implementation, rule: Rule, params: Sequence[Parameter], groups: int = 1
) -> Step:
    """The step of a new optimizer."""
    parts: Any = [{"params": params[i::groups]} for i in range(groups)]
    step: Step = implementation.build(rule, parts).step
    return step


def launch_rows(rule: str) -> list[Row]:
    """The launch alone, as the package does it and by Triton's own launcher."""
    case = Case(rule, 10, PLAIN, STAY)
    params = _with_gradients(case.tensors, PLAIN)
    optimizer = getattr(triton_optim, RULES[rule].optimizer)(params, **RULES[rule].kwargs)
    optimizer.step()
    launch = optimizer._stepper.plan.launch_groups[0]._launches[frozenset()][0]
    by_triton = partial(multi_tensor_kernel[launch.grid], **launch.arguments, **launch.options)
    launches = {LAUNCHES[0]: lambda: launch.run, LAUNCHES[1]: lambda: by_triton}
    return [case.row(name, times) for name, times in in_turn(launches, N_LAUNCHES).items()]


def cold_rows(names: Sequence[str]) -> list[Row]:
    """First steps of DTensors, in processes that find Triton's cache empty, one rule after another.

    What a process compiles or propagates for a rule, it has for those after it.
    """
    rows = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for by in (OURS, "foreach"):
        command = [sys.executable, "-m", "lab.host_steps", by, *names]
        with tempfile.TemporaryDirectory() as cache:
            environment["TRITON_CACHE_DIR"] = cache
            printed = subprocess.check_output(
                command, env=environment, stderr=subprocess.PIPE, text=True
            )
        for rule, time in zip(names, printed.split(), strict=True):
            rows.append(Case(rule, COLD_TENSORS, DTENSOR, COLD).row(by, [float(time)]))
    return rows


def _print_first_steps(by: str, *names: str) -> None:
    torch.set_num_threads(1)
    with nullcontext() if torch.cuda.is_available() else dry_gpu(), one_process():
        for rule in names:
            params = _with_gradients(COLD_TENSORS, DTENSOR)
            print(*in_turn({rule: partial(new_step, STEPPED[by], RULES[rule], params)}, 1)[rule])


if __name__ == "__main__":
    _print_first_steps(*sys.argv[1:])
