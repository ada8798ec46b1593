"""What the training scripts have in common: options, a timed step, and curves."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_options(
    parser: argparse.ArgumentParser, size: int, steps: int, batch: int, plot: str
) -> None:
    """Those that both scripts have, with their defaults."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--size", type=positive, default=size, help="width of the model")
    parser.add_argument("--steps", type=positive, default=steps)
    parser.add_argument("--batch", type=positive, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--plot", type=Path, default=Path(plot), help="a PNG")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.plot.is_dir() or not args.plot.parent.is_dir():
        parser.error(f"--plot {args.plot}: not a file in an existing folder")
    return args


def prepare(device: str) -> None:
    """Before triton_optim is imported: on the CPU its kernels are interpreted."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton_optim imports triton
        # OpenMP's threads spin for one another: where another process holds a core, two are 100
        # times as slow as one, which these models keep busy anyway.
        torch.set_num_threads(1)
        print("On the CPU the very same kernels run in Triton's interpreter.")


def timed_step(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Steps, and returns the milliseconds that it took."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def style(color: int, label: str, reference: str | None) -> dict[str, Any]:
    """How a curve is drawn; those of a reference look alike, and are called so."""
    if reference is not None:
        return {"label": reference, "color": "black", "linewidth": 0.9, "linestyle": ":"}
    return {"label": label, "color": f"C{color}", "linewidth": 1.3}


def save(figure: Figure, path: Path) -> None:
    for panel in figure.axes:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))  # torch's runs look alike: one entry
        if unique:
            panel.legend(unique.values(), unique.keys(), frameon=False)
    figure.savefig(path, format="png", dpi=150)
    print(f"wrote {path}")
