"""What is timed by itself: one launch, and the first steps of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

import triton_optim
from lab import host_tensors
from lab.dry_gpu import dry_gpu
from lab.host_rows import COLD, DTENSOR, LAUNCHES, PLAIN, STAY, Row
from lab.host_steps import NAMES, RULES, Case, microseconds, new_step
from lab.implementations import IMPLEMENTATIONS, OURS
from triton_optim.kernels.multi_tensor import multi_tensor_kernel

COLD_TENSORS = 100
N_LAUNCHES = 200


def launch_rows(rule: str) -> list[Row]:
    """The launch alone, as the package does it and by Triton's own launcher."""
    case = Case(rule, 10, PLAIN, STAY)
    params = host_tensors.parameters(case.tensors, PLAIN)
    host_tensors.new_gradients(params, params)
    optimizer = getattr(triton_optim, RULES[rule].optimizer)(params, **RULES[rule].kwargs)
    optimizer.step()
    launch = optimizer._stepper.plan.launch_groups[0]._launches[frozenset()][0]
    by_triton = partial(multi_tensor_kernel[launch.grid], **launch.arguments, **launch.options)
    works = dict(zip(LAUNCHES, (launch.run, by_triton), strict=True))
    series: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(N_LAUNCHES):
        for name, work in works.items():
            series[name].append(microseconds(work))
    return [case.row(name, times) for name, times in series.items()]


def cold_rows(rules: Sequence[str]) -> list[Row]:
    """First steps of DTensors, in processes that find Triton's cache empty, one rule after another.

    What a process compiles or propagates for a rule, it has for those after it.
    """
    rows = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in (OURS, "foreach"):
        command = [sys.executable, "-m", "lab.host_starts", name, *rules]
        with tempfile.TemporaryDirectory() as cache:
            environment["TRITON_CACHE_DIR"] = cache
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
        for rule, time in zip(rules, done.stdout.split(), strict=True):
            rows.append(Case(rule, COLD_TENSORS, DTENSOR, COLD).row(name, [float(time)]))
    return rows


def _print_first_steps(name: str, rules: Sequence[str]) -> None:
    torch.set_num_threads(1)
    (implementation,) = (item for item in IMPLEMENTATIONS if NAMES.get(item.name) == name)
    with nullcontext() if torch.cuda.is_available() else dry_gpu(), host_tensors.one_process():
        for rule in rules:
            params = host_tensors.parameters(COLD_TENSORS, DTENSOR)
            host_tensors.new_gradients(params, params)
            print(microseconds(new_step(implementation, RULES[rule], params)))


if __name__ == "__main__":
    _print_first_steps(sys.argv[1], sys.argv[2:])
