"""What the runs of the main job printed and drew."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from lab.training import OPTIMIZERS, Run

ONE_PROCESS = "one process"  # the implementation of a run that others are held against
REFERENCES = {"torch": "torch.optim", ONE_PROCESS: ONE_PROCESS}  # and their labels


def report(runs: list[Run]) -> None:
    """Prints a row a run; where another follows ours, how far apart the two ever were."""
    print(f"{'optimizer':<10} {'by':<12} {'start':>7} {'end':>7} {'ms/step':>9} {'max |diff|':>11}")
    ours: dict[str, Run] = {}
    for run in runs:
        other = ours.setdefault(run.optimizer, run)
        pairs = zip(run.losses, other.losses, strict=True)
        difference = "" if other is run else f"{max(abs(a - b) for a, b in pairs):11.1e}"
        ms = f"{median(run.step_ms):9.3f}" if run.step_ms else f"{'-':>9}"
        print(
            f"{run.optimizer:<10} {run.implementation:<12} {run.losses[0]:7.3f} {run.end:7.3f} "
            f"{ms} {difference}"
        )


def plot(runs: list[Run], entropy: float, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        label = run.optimizer
        color = f"C{list(OPTIMIZERS).index(run.optimizer)}"
        style: dict[str, Any] = {"color": color, "linewidth": 1.3}
        if run.implementation in REFERENCES:
            label = REFERENCES[run.implementation]
            style = {"color": "black", "linewidth": 0.9, "linestyle": ":"}
        left.plot(run.losses, label=label, **style)
        if run.rates:
            right.plot(list(run.rates), list(run.rates.values()), label=label, **style)
    left.axhline(entropy, color="gray", linestyle="--", label="unigram entropy")
    left.set(title="Loss", xlabel="step", ylabel="nats per byte")
    right.set(
        title="Effective step size: median of lr / (√state + eps)", xlabel="step", yscale="log"
    )
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    for panel in (left, right):
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))  # torch's runs look alike: one entry
        if unique:
            panel.legend(unique.values(), unique.keys(), frameon=False)
    figure.savefig(path, format="png", dpi=150)
