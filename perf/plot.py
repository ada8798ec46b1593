"""Draws CSV files: of bench_step.py time against torch and a roofline, of bench_host.py host time.

    python perf/plot.py
    python perf/plot.py perf/results/step-sweep-nvidia-h200-20260101-000000.csv

Reads nothing but the files, by default all of perf/results, and draws one picture a kind, GPU and
storage beside them, and one a host-*.csv. Of two measurements of the same thing, the later counts.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from lab import host_rows
from lab.host_rows import FRESH, PARAMS, SERIES, TORCH, found
from lab.implementations import IMPLEMENTATIONS
from lab.rows import COPIES, COPY, MIXED_COPY, OK, OURS, TORCH_BEST, Row, read
from lab.rules import RULES
from matplotlib import colormaps
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
HOST = "host-"  # how the names of bench_host.py's files begin
Picture = dict[tuple[str, str, str], Row]  # by layout, rule and implementation
Group = dict[str, Row]  # by implementation
Point = tuple[float, float]
# "tab20" has ten colors, a dark and a light one of each in turn: the dark ones come first.
ORDER = (*range(0, 20, 2), *range(1, 20, 2))
COLORS = {item.name: colormaps["tab20"](ORDER[i]) for i, item in enumerate(IMPLEMENTATIONS)}
TITLES = {"plain": "plain tensors", "dtensor": "DTensors"}
BLACK: dict[str, Any] = {"color": "black", "linewidth": 0.9}


def pictures(rows: Iterable[Row]) -> dict[tuple[str, str], Picture]:
    """Rows of dense gradients with a time, by GPU and storage; a later one replaces an earlier."""
    drawn: dict[tuple[str, str], Picture] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.date):
        if row.status == OK and not row.batch:
            drawn[row.gpu, row.storage][row.layout, row.rule, row.implementation] = row
    return drawn


def time_against_torch(picture: Picture) -> Figure:
    """A panel a rule: time of a step over that of the best of torch's own, layout by layout."""

    def point(place: int, group: Group, name: str) -> Point | None:
        times = [group[other].gpu_us or math.nan for other in TORCH_BEST if other in group]
        return (place, (group[name].gpu_us or math.nan) / min(times)) if times else None

    def finish(panel: Any, rule: str, groups: Sequence[Group]) -> None:
        panel.axhline(1, linestyle="--", **BLACK)
        layouts = [next(iter(group.values())).layout for group in groups]
        panel.set_xticks(range(len(groups)), layouts, rotation=90)
        panel.set(title=rule, yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")

    return _figure(picture, "GPU time / best of torch's own", point, finish)


def roofline(picture: Picture) -> Figure:
    """A panel a rule: bytes a second over bytes a step, under the bandwidth of copies."""

    def point(_: int, group: Group, name: str) -> Point:
        return group[name].step_bytes or 0, group[name].gb_per_s or 0

    def finish(panel: Any, rule: str, _: Sequence[Group]) -> None:
        """Lines at the lowest and the highest bandwidth of a copy; the mixed one is the rule's."""
        for name, style in ((COPY, "--"), (MIXED_COPY, ":")):
            copies = [row for row in picture.values() if row.implementation == name]
            rates = sorted(r.gb_per_s or 0 for r in copies if name == COPY or r.rule == rule)
            for rate in rates[:1] + rates[-1:]:
                panel.axhline(rate, linestyle=style, **BLACK)
        panel.set(title=rule, xlabel="bytes a step must move", xscale="log", yscale="log")

    return _figure(picture, "GB/s (dashed: copy, dotted: mixed copy)", point, finish)


def _figure(
    picture: Picture,
    label: str,
    point: Callable[[int, Group, str], Point | None],
    finish: Callable[[Any, str, Sequence[Group]], None],
) -> Figure:
    """A panel a rule, with a line an implementation."""
    figure = Figure(figsize=(3 * len(RULES), 4.5), layout="constrained")
    panels = figure.subplots(1, len(RULES), sharey=True)
    panels[0].set_ylabel(label)
    labelled: dict[str, Any] = {}
    for panel, rule in zip(panels, RULES, strict=True):
        groups = _groups(picture, rule.name)
        for name, color in COLORS.items():
            points = [point(i, group, name) for i, group in enumerate(groups) if name in group]
            if drawn := [*filter(None, points)]:
                style = {"color": color, "linewidth": 2.0 if name == OURS else 0.8}
                panel.plot(*zip(*drawn, strict=True), "o-", label=name, markersize=3, **style)
        finish(panel, rule.name, groups)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        labelled.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    columns = max(1, len(labelled))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns)
    return figure


def _groups(picture: Picture, rule: str) -> list[Group]:
    """Rows of one rule by implementation, a layout each, the smallest first; no copies."""
    groups: dict[str, Group] = defaultdict(dict)
    for (layout, row_rule, name), row in picture.items():
        if row_rule == rule and name not in COPIES:
            groups[layout][name] = row
    return sorted(groups.values(), key=lambda group: next(iter(group.values())).params)


def draw_hosts(rows: Sequence[host_rows.Row], path: Path) -> None:
    """A column a rule, a line of panels a kind of parameters: fresh gradients in one group."""
    fresh = found(rows, gradients=FRESH, groups=1)
    rules = [*dict.fromkeys(row.rule for row in rows)]
    kinds = [kind for kind in PARAMS if found(fresh, params=kind)]
    figure = Figure(figsize=(3.2 * len(rules), 3.2 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(rules), sharex=True, sharey=True, squeeze=False)
    for (line, kind), (column, rule) in product(enumerate(kinds), enumerate(rules)):
        panel = panels[line][column]
        for name in SERIES:
            series = found(fresh, rule=rule, params=kind, implementation=name)
            label = f"torch {name}" if name in TORCH else name
            times = [row.median / row.tensors for row in series]
            panel.plot([row.tensors for row in series], times, "o-", label=label)
        panel.set(title=f"{rule}, {TITLES[kind]}", xscale="log", yscale="log")
        panels[line][0].set_ylabel("host time, us a tensor")
        panels[-1][column].set_xlabel("tensors")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, format="png", dpi=120)


def draw(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write the PNG files; returns their paths."""
    hosts = [file for file in files if file.name.startswith(HOST)]
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / file.with_suffix(".png").name for file in hosts]
    for file, path in zip(hosts, written, strict=True):
        draw_hosts(host_rows.read(file), path)
    rows = [row for file in files if file not in hosts for row in read(file)]
    for (gpu, storage), picture in pictures(rows).items():
        row = next(iter(picture.values()))
        for kind, make in (("time-against-torch", time_against_torch), ("roofline", roofline)):
            figure = make(picture)
            figure.suptitle(f"{gpu}, {storage}; torch {row.torch}, Triton {row.triton}")
            slug = re.sub(r"[^a-z0-9+]+", "-", f"{gpu} {storage}".lower()).strip("-")
            written.append(folder / f"{kind}-{slug}.png")
            figure.savefig(written[-1], format="png", dpi=150)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all of perf/results")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the pictures go")
    args = parser.parse_args(argv)
    files = args.files or [
        file for kind in ("step-", HOST) for file in sorted(RESULTS.glob(f"{kind}*.csv"))
    ]
    if not files:
        message = "bench_step.py writes them, on a GPU, and bench_host.py"
        print(f"No step-*.csv or host-*.csv in {RESULTS}: {message}.", file=sys.stderr)
        return 1
    try:
        written = draw(files, args.folder)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"wrote {path}" for path in written) or "no row has a time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
