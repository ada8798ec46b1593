"""Storage of parameters and state side by side: losses beside those of float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lab import rows
from lab.curves import finish
from lab.precisions import FLOAT32
from lab.tables import Column, print_table
from lab.training import Run

POINTS = 100  # of a curve: each is the mean of as many steps


class Compared(NamedTuple):
    """What an optimizer did in one precision, over all seeds, and what it did in float32."""

    optimizer: str
    precision: str
    runs: Sequence[Run]
    reference: Sequence[Run]  # of the same seeds, in float32

    @property
    def apart(self) -> list[float]:
        """How much higher the loss ended than in float32, by seed."""
        pairs = zip(self.runs, self.reference, strict=True)
        return [run.end - other.end for run, other in pairs]

    @property
    def differences(self) -> Tensor:
        """The same by seed and point of the curve."""
        return _curves(self.runs) - _curves(self.reference)


def of(runs: Sequence[Run]) -> list[Compared]:
    """By optimizer and precision, those of float32 among them."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.optimizer, run.precision), []).append(run)
    return [Compared(*key, of, found[key[0], FLOAT32]) for key, of in found.items()]


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def report(groups: Sequence[Compared]) -> None:
    """Prints a row for each: means over seeds, and their standard deviations."""
    columns = (
        Column("optimizer", "<11", "optimizer"),
        Column("precision", "<12", "precision"),
        Column("seeds", ">6", lambda c: len(c.runs)),
        Column("bytes/param", ">12.2f", lambda c: c.runs[0].bytes_per_param),
        Column("start", ">8.3f", lambda c: fmean(run.losses[0] for run in c.runs)),
        Column("end", ">8.3f", lambda c: fmean(run.end for run in c.runs)),
        Column("spread", ">8.3f", lambda c: _spread([run.end for run in c.runs])),
        Column("- float32", ">11.4f", lambda c: fmean(c.apart)),
        Column("spread", ">8.4f", lambda c: _spread(c.apart)),
        Column("ms/step", ">9.1f", lambda c: median(ms for run in c.runs for ms in run.step_ms)),
    )  # fmt: skip
    print_table(columns, groups)
    print(
        "end: mean of the last losses; - float32: how much higher than in float32 from the same "
        "seed; spread: standard deviation over seeds"
    )


def plot(groups: Sequence[Compared], path: Path) -> None:
    """A row of panels an optimizer: the losses, and how far they are from float32's."""
    names = [*dict.fromkeys(group.optimizer for group in groups)]
    figure = Figure(figsize=(11, 4.2 * len(names)), layout="constrained")
    for name, (left, right) in zip(names, figure.subplots(len(names), 2, squeeze=False),
                                   strict=True):  # fmt: skip
        of = [group for group in groups if group.optimizer == name]
        steps, spread = _steps(of[0].runs), _curves(of[0].reference)
        for i, group in enumerate(of):
            color = "black" if group.precision == FLOAT32 else f"C{i}"
            style = {"label": group.precision, "color": color}
            left.plot(steps, _curves(group.runs).mean(0), **style)
            if group.precision != FLOAT32:
                right.plot(steps, group.differences.mean(0), **style)
                for line in group.differences:
                    right.plot(steps, line, color=color, linewidth=0.6, alpha=0.4)
        if len(spread) > 1:
            band = spread.std(0)
            right.fill_between(steps, -band, band, color="0.88", label="float32's spread")
        right.axhline(0, color="black", linewidth=0.8)
        finish(left, {"title": f"Loss, {name}", "ylabel": "nats per byte"})
        finish(right, {"title": "Loss beyond float32's from the same seed, and its mean"})
    figure.savefig(path, format="png", dpi=120)


def write(groups: Sequence[Compared], path: Path, about: dict[str, Any]) -> None:
    """A row for each point of a curve. about: columns that are the same in all."""
    lines = [
        {
            **about, "optimizer": group.optimizer, "precision": group.precision, "seed": run.seed,
            "bytes_per_param": f"{run.bytes_per_param:.3f}", "step": step, "loss": f"{loss:.4f}",
        }
        for group in groups
        for run, curve in zip(group.runs, _curves(group.runs).tolist(), strict=True)
        for step, loss in zip(_steps(group.runs), curve, strict=True)
    ]  # fmt: skip
    rows.write(path, [*lines[0]], lines)


def _window(runs: Sequence[Run]) -> int:
    return max(1, len(runs[0].losses) // POINTS)


def _steps(runs: Sequence[Run]) -> list[int]:
    window = _window(runs)
    return [*range(window, len(runs[0].losses) + 1, window)]


def _curves(runs: Sequence[Run]) -> Tensor:
    """By seed and point of the curve."""
    window = _window(runs)
    return torch.tensor([run.losses for run in runs]).unfold(1, window, window).mean(2)
