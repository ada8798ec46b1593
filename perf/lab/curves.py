"""What the runs of a training script printed and drew."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from lab.tables import Column, print_table
from lab.training import Run

ONE_PROCESS = "one process"  # by whom a run is that others are held against
LABELS = {"torch": "torch.optim"}


def apart(run: Run, other: Run) -> float:
    """The largest difference of two loss curves; NaN where one is not finite."""
    return (torch.tensor(run.losses) - torch.tensor(other.losses)).abs().max().item()


def report(runs: list[Run], *more: Column) -> None:
    """Prints a row a run; where another follows ours, how far apart the two ever were."""
    ours = {run.optimizer: run for run in reversed(runs)}  # the first of each
    columns = (
        Column("optimizer", "<17", "optimizer"),
        Column("by", "<12", "by"),
        Column("start", ">8.3f", lambda run: run.losses[0]),
        Column("end", ">8.3f", "end"),
        *more,
        Column("ms/step", ">10.3f", lambda run: median(run.step_ms) if run.step_ms else None),
        Column("max |diff|", ">12.1e", lambda run: (
            None if (other := ours[run.optimizer]) is run else apart(run, other))),
    )  # fmt: skip
    print_table(columns, runs)


def plot(
    runs: list[Run], path: Path, left: dict[str, Any], right: dict[str, Any], *,
    labels: dict[str, str] | None = None, smoothing: int = 1, entropy: float | None = None,
) -> None:  # fmt: skip
    """Losses on the left, what else was measured on the right.

    Args:
        left, right: arguments of `Axes.set`.
        labels: of our runs, by optimizer; without them its name.
        smoothing: steps whose mean is a point of the loss.
        entropy: a horizontal line.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    names = [*dict.fromkeys(run.optimizer for run in runs)]
    for run in runs:
        label = (labels or {}).get(run.optimizer, run.optimizer)
        style: dict[str, Any] = {"color": f"C{names.index(run.optimizer)}", "linewidth": 1.3}
        if run.by != "triton_optim":
            label = LABELS.get(run.by, run.by)
            style = {"color": "black", "linewidth": 0.9, "linestyle": ":"}
        window = min(smoothing, len(run.losses))
        smooth = torch.tensor(run.losses).unfold(0, window, 1).mean(1).tolist()
        panels[0].plot(range(window, len(run.losses) + 1), smooth, label=label, **style)
        if run.measured:
            panels[1].plot(list(run.measured), list(run.measured.values()), label=label, **style)
    if entropy is not None:
        panels[0].axhline(entropy, color="gray", linestyle="--", label="unigram entropy")
    for panel, settings in zip(panels, (left, right), strict=True):
        finish(panel, settings)
    figure.savefig(path, format="png", dpi=150)


def finish(panel: Any, settings: dict[str, Any]) -> None:
    """Axes, grid and legend of a panel whose curves are drawn. settings: of `Axes.set`."""
    panel.set(xlabel="step", **settings)
    for axis_format in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis_format("{x:g}")
    panel.grid(alpha=0.3, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # torch's runs look alike: one entry
    if unique:
        panel.legend(unique.values(), unique.keys(), frameon=False)
