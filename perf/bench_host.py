"""Host time of `step()` with launches stubbed out, beside only reading `p.grad.data_ptr()`.

    python perf/bench_host.py

Every row is measured in one interleaved run: medians, and the 20th to 80th percentile. `stay`:
the same gradients at every step; `fresh`: new ones from a backward pass at every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton_optim
from triton_optim import runtime

RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
]


def main() -> None:
    """Print a row a rule and a kind of gradients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runtime.launch = lambda *_: None

    print(
        f"torch {torch.__version__}, {args.tensors} tensors on {device}, one thread; microseconds"
    )
    print(f"{'optimizer':<40}{'gradients':<10}{'floor':>18}{'step':>20}{'step / floor':>14}")
    for name, kwargs in RULES:
        for fresh in (False, True):
            params = [Parameter(torch.randn(4, 8, device=device)) for _ in range(args.tensors)]
            optimizer = getattr(triton_optim, name)(params, **kwargs)
            times = _measure(params, optimizer.step, fresh, args.repeats)
            floor, step = (_summary(series) for series in times)
            ratio = statistics.median(times[1]) / statistics.median(times[0])
            label = f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})"
            kind = "fresh" if fresh else "stay"
            print(f"{label:<40}{kind:<10}{floor:>18}{step:>20}{ratio:>14.2f}")


def _measure(
    params: list[Parameter], step: Callable[[], object], fresh: bool, repeats: int
) -> tuple[list[float], list[float]]:
    """Microseconds of the floor and of the step, in turn."""
    floors: list[float] = []
    steps: list[float] = []
    _backward(params)
    for repeat in range(repeats + 2):
        for series, work in ((floors, lambda: _read_addresses(params)), (steps, step)):
            if fresh:
                _backward(params)
            start = time.perf_counter()
            work()
            if repeat >= 2:
                series.append(1e6 * (time.perf_counter() - start))
    return floors, steps


def _read_addresses(params: list[Parameter]) -> list[int]:
    return [p.grad.data_ptr() for p in params]  # type: ignore[union-attr]


def _backward(params: list[Parameter]) -> None:
    """Give every parameter a new gradient."""
    for param in params:
        param.grad = None
    torch.stack([(param * 2).sum() for param in params]).sum().backward()


def _summary(series: list[float]) -> str:
    low, *_, high = statistics.quantiles(series, n=5)
    return f"{statistics.median(series):.0f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    main()
