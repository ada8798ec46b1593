"""Draws the rows of bench_host.py: host time a tensor against the number of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lab.host_rows import FRESH, PARAMS, SERIES, TORCH, Row, found

TITLES = {"plain": "plain tensors", "dtensor": "DTensors"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """A column a rule, a line of panels a kind of parameters: fresh gradients in one group."""
    rules = [*dict.fromkeys(row.rule for row in rows)]
    kinds = [kind for kind in PARAMS if found(rows, params=kind, gradients=FRESH)]
    figure = Figure(figsize=(3.2 * len(rules), 3.2 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(rules), sharex=True, sharey=True, squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        for panel, rule in zip(line, rules, strict=True):
            _draw(panel, found(rows, rule=rule, params=kind, gradients=FRESH, groups=1))
            panel.set(title=f"{rule}, {TITLES[kind]}", xscale="log", yscale="log")
        line[0].set_ylabel("host time, us a tensor")
    for panel in panels[-1]:
        panel.set_xlabel("tensors")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, format="png", dpi=120)


def _draw(panel: Any, rows: Sequence[Row]) -> None:
    for name in SERIES:
        series = found(rows, implementation=name)
        label = f"torch {name}" if name in TORCH else name
        times = [row.median / row.tensors for row in series]
        panel.plot([row.tensors for row in series], times, "o-", label=label)
