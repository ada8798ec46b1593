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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import host_plot, host_rows
from lab.implementations import IMPLEMENTATIONS
from lab.rows import COPIES, COPY, MIXED_COPY, OK, OURS, TORCH_BEST, Row, read
from lab.rules import RULES
from matplotlib import colormaps
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
HOST = "host-"  # how the names of bench_host.py's files begin
Picture = dict[tuple[str, str, str], Row]  # by layout, rule and implementation
# "tab20" has ten colors, a dark and a light one of each in turn: the dark ones come first.
ORDER = (*range(0, 20, 2), *range(1, 20, 2))
COLORS = {item.name: colormaps["tab20"](ORDER[i]) for i, item in enumerate(IMPLEMENTATIONS)}
BLACK: dict[str, Any] = {"color": "black", "linewidth": 0.9}


def pictures(rows: Iterable[Row]) -> dict[tuple[str, str], Picture]:
    """Rows of dense gradients with a time, by GPU and storage; a later one replaces an earlier."""
    found: dict[tuple[str, str], Picture] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.date):
        if row.status == OK and not row.batch:
            found[row.gpu, row.storage][row.layout, row.rule, row.implementation] = row
    return found


def time_against_torch(picture: Picture) -> Figure:
    """A panel a rule: time of a step over that of the best of torch's own, layout by layout."""
    figure, panels = _figure("GPU time / best of torch's own")
    for panel, rule in zip(panels, RULES, strict=True):
        groups = _groups(picture, rule.name)
        for name in COLORS:
            points = [
                (place, _gpu_us(group[name]) / best)
                for place, group in enumerate(groups)
                if name in group and (best := _best(group)) is not None
            ]
            _draw(panel, name, points)
        panel.axhline(1, linestyle="--", **BLACK)
        panel.set_xticks(range(len(groups)), [_layout(group) for group in groups], rotation=90)
        panel.set(title=rule.name, yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
    _finish(figure, panels)
    return figure


def roofline(picture: Picture) -> Figure:
    """A panel a rule: bytes a second over bytes a step, under the bandwidth of copies."""
    figure, panels = _figure("GB/s (dashed: copy, dotted: mixed copy)")
    copies = [row for row in picture.values() if row.implementation == COPY]
    mixed = [row for row in picture.values() if row.implementation == MIXED_COPY]
    for panel, rule in zip(panels, RULES, strict=True):
        groups = _groups(picture, rule.name)
        for name in COLORS:
            rows = [group[name] for group in groups if name in group]
            _draw(panel, name, [(row.step_bytes or 0, row.gb_per_s or 0) for row in rows])
        _draw_range(panel, copies, "--")
        _draw_range(panel, [row for row in mixed if row.rule == rule.name], ":")
        panel.set(title=rule.name, xlabel="bytes a step must move", xscale="log", yscale="log")
    _finish(figure, panels)
    return figure


def _groups(picture: Picture, rule: str) -> list[dict[str, Row]]:
    """Rows of one rule by implementation, a layout each, the smallest first; no copies."""
    groups: dict[str, dict[str, Row]] = defaultdict(dict)
    for (layout, row_rule, name), row in picture.items():
        if row_rule == rule and name not in COPIES:
            groups[layout][name] = row
    return sorted(groups.values(), key=lambda group: next(iter(group.values())).params)


def _layout(group: Mapping[str, Row]) -> str:
    return next(iter(group.values())).layout


def _best(group: Mapping[str, Row]) -> float | None:
    return min((_gpu_us(group[name]) for name in TORCH_BEST if name in group), default=None)


def _gpu_us(row: Row) -> float:
    return row.gpu_us or math.nan


def _figure(label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(3 * len(RULES), 4.5), layout="constrained")
    panels = figure.subplots(1, len(RULES), sharey=True)
    panels[0].set_ylabel(label)
    return figure, panels


def _draw(panel: Any, name: str, points: Sequence[tuple[float, float]]) -> None:
    if points:
        width = 2.0 if name == OURS else 0.8
        style = {"color": COLORS[name], "linewidth": width, "marker": "o", "markersize": 3}
        panel.plot(*zip(*points, strict=True), label=name, **style)


def _draw_range(panel: Any, copies: Iterable[Row], linestyle: str) -> None:
    """A line at the lowest and one at the highest bandwidth of copies, if there are any."""
    rates = sorted(row.gb_per_s or 0 for row in copies)
    for rate in rates[:1] + rates[-1:]:
        panel.axhline(rate, linestyle=linestyle, **BLACK)


def _finish(figure: Figure, panels: Any) -> None:
    labelled: dict[str, Any] = {}
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    columns = max(1, len(labelled))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns)


def draw(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write the PNG files; returns their paths."""
    hosts = [file for file in files if file.name.startswith(HOST)]
    written = [folder / file.with_suffix(".png").name for file in hosts]
    for file, path in zip(hosts, written, strict=True):
        host_plot.draw(host_rows.read(file), path)
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
