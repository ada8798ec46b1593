"""Host time of `step()` beside torch's, and beside only reading `p.grad.data_ptr()`.

    python perf/bench_host.py

Every implementation steps the same tensors in turn in one run: medians, 20th and 80th percentile.
`fresh`: new gradients from a backward pass before every step; `stay`: the same ones. Without a GPU
our kernels are compiled for sm_90, bound and handed to a launcher that does nothing (dry_gpu.py);
torch's times hold its arithmetic on 32 elements a tensor, which a GPU would do meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from lab import implementations
from lab.dry_gpu import dry_gpu
from lab.timing import Summary
from matplotlib.figure import Figure
from torch.nn import Parameter

import triton_optim
from triton_optim.kernels.multi_tensor import multi_tensor_kernel

Work = Callable[[], object]

RULES = {rule.name: rule for rule in implementations.RULES}
TORCH = ("for-loop", "foreach", "fused")
NAMES = {implementations.OURS: implementations.OURS, **{f"torch {name}": name for name in TORCH}}
SERIES = ("floor", "triton_optim", *TORCH)
COUNTS = (10, 100, 300, 1000, 3000)
GROUPS = (1, 20)
WARMUP = 2


class Row(NamedTuple):
    """Microseconds of one step."""

    rule: str
    tensors: int
    groups: int
    gradients: str
    implementation: str
    median: float
    p20: float
    p80: float


def main() -> None:
    """Measure, print, and write a CSV and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="FILE.csv; the plot is FILE.png")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with nullcontext() if torch.cuda.is_available() else dry_gpu():
        if args.first_step:
            print(*(f"{rule} {_first_step(rule):.2f} s" for rule in args.rules), sep=", ")
            return
        print(f"{_machine()}; microseconds a step: median (20th to 80th percentile)\n")
        print(f"{'':<37}{'floor':>22}{'triton_optim':>22}{'':>9}", end="")
        print("".join(f"{f'torch {name}':>22}" for name in TORCH))
        rows: list[Row] = []
        for case in product(args.rules, args.tensors, ("stay", "fresh")):
            measured = _measure(*case, args.repeats)
            rows += measured
            for _, of_groups in groupby(measured, key=lambda row: row.groups):
                _print([*of_groups])
            if args.out:  # now, for something may end this run
                _write(args.out.with_suffix(".csv"), rows)
        _print_launch(args.rules[0])
    _print_first_step(args.rules)
    if args.out:
        _plot(args.out.with_suffix(".png"), rows)


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    return f"{device}, {versions}, Python {platform.python_version()}, one thread"


def _params(n: int) -> list[Parameter]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [Parameter(torch.randn(4, 8, device=device)) for _ in range(n)]


def _backward(params: Sequence[Parameter]) -> None:
    """Give every parameter a new gradient."""
    for param in params:
        param.grad = None
    torch.stack([(param * 2).sum() for param in params]).sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _works(rule: str, params: Sequence[Parameter], groups: int) -> dict[str, Work]:
    """The floor, and a step of every implementation that there is."""
    slow = RULES[rule]._replace(kwargs={**RULES[rule].kwargs, "lr": 1e-6})
    works: dict[str, Work] = {
        "floor": lambda: [p.grad.data_ptr() for p in params]  # type: ignore[union-attr]
    }
    for implementation in implementations.IMPLEMENTATIONS:
        name = NAMES.get(implementation.name)
        if name is not None and implementation.refusal(slow, implementations.STORAGES[0]) is None:
            parts: Any = [{"params": params[i::groups]} for i in range(groups)]
            works[name] = implementation.build(slow, parts).step
    return works


def _ours(rule: str, params: Sequence[Parameter]) -> Any:
    return getattr(triton_optim, RULES[rule].optimizer)(params, **RULES[rule].kwargs)


def _measure(rule: str, n: int, gradients: str, repeats: int) -> list[Row]:
    """Everything that steps these tensors, in turn."""
    params = _params(n)
    _backward(params)
    works = {
        (groups, name): work
        for groups in GROUPS
        if n >= 5 * groups
        for name, work in _works(rule, params, groups).items()
    }
    series: dict[tuple[int, str], list[float]] = {key: [] for key in works}
    for repeat in range(repeats + WARMUP):
        for key, work in works.items():
            if gradients == "fresh":
                _backward(params)
            elapsed = _microseconds(work)
            if repeat >= WARMUP:
                series[key].append(elapsed)
    return [
        Row(rule, n, groups, gradients, name, *Summary.of(times))
        for (groups, name), times in series.items()
    ]


def _microseconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - start)


def _print(rows: Sequence[Row]) -> None:
    by_name = {row.implementation: row for row in rows}
    first, cells = rows[0], []
    for name in SERIES:
        row = by_name.get(name)
        cells.append(f"{row.median:.0f} ({row.p20:.0f}-{row.p80:.0f})" if row else "none")
    ratio = f"= {by_name['triton_optim'].median / by_name['floor'].median:.1f} x"
    print(
        f"{first.rule:<13}{first.tensors:>5} in {first.groups:>2}, {first.gradients:<8}", end="  "
    )
    print(f"{cells[0]:>22}{cells[1]:>22}{ratio:>9}" + "".join(f"{cell:>22}" for cell in cells[2:]))


def _print_launch(rule: str) -> None:
    """The launch alone, as the package does it and by Triton's own launcher."""
    params = _params(10)
    _backward(params)
    optimizer = _ours(rule, params)
    optimizer.step()
    launch = optimizer._internals.plan._tables[0]._launches[frozenset()][0]
    by_triton = partial(multi_tensor_kernel[launch.grid], **launch.arguments, **launch.options)
    works = {"directly": launch.run, "by Triton's launcher": by_triton}
    series: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(200):
        for name, work in works.items():
            series[name].append(_microseconds(work))
    for name in works:
        median, low, high = Summary.of(series[name])
        print(f"one launch {name}: {median:.1f} ({low:.1f}-{high:.1f}) us")


def _first_step(rule: str) -> float:
    """Seconds of a rule's first step."""
    params = _params(10)
    _backward(params)
    return _microseconds(_ours(rule, params).step) / 1e6


def _print_first_step(rules: Sequence[str]) -> None:
    command = [sys.executable, __file__, "--first-step", "--rules", *rules]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    print(f"first steps with an empty Triton cache, one after another: {done.stdout.strip()}")


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["machine", *Row._fields])
        writer.writerows([_machine(), *row] for row in rows)


def _plot(path: Path, rows: Sequence[Row]) -> None:
    """Microseconds a tensor against the number of tensors, fresh gradients in one group."""
    rules = sorted({row.rule for row in rows}, key=list(RULES).index)
    figure = Figure(figsize=(3.2 * len(rules), 3.2), layout="constrained")
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for axis, rule in zip(axes, rules, strict=True):
        for name in SERIES:
            found = [
                row
                for row in rows
                if (row.rule, row.groups, row.gradients) == (rule, 1, "fresh")
                and row.implementation == name
            ]
            label = f"torch {name}" if name in TORCH else name
            counts = [row.tensors for row in found]
            axis.plot(counts, [row.median / row.tensors for row in found], "o-", label=label)
        axis.set(title=rule, xscale="log", yscale="log", xlabel="tensors")
    axes[0].set_ylabel("host time, us a tensor")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
