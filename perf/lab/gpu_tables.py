"""Tables of GPU time, from the CSV files that bench_step.py wrote on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lab import rows, tables
from lab.rows import OK, OURS, Row
from lab.rules import ALL_STORAGES, TITLES

RIVALS = ("torch fused", "torch foreach", "torch compiled", "optimi", "FlashOptim")
LAYOUTS = {"1x100M": "1 tensor of 100 M", "1000x1024": "1,000 tensors of 1,024"}
WAITS = "waits"  # the GPU, for launches of the host
OF_FORMATS = "gpt2"


def measured(folder: Path) -> list[Row]:
    """All rows of a GPU that have a time; the latest come last."""
    found = [row for path in folder.glob("step-*.csv") for row in rows.read(path)]
    return sorted((row for row in found if row.status == OK and row.gpu_us), key=lambda r: r.date)


def beside_torch(found: Sequence[Row]) -> str:
    """float32, by layout and rule, of everybody who was right: GPU time, and a share or all time.

    Where the host is the limit, a copy's bandwidth means nothing, and all time is shown.
    """
    times = {(r.layout, r.rule, r.implementation): r for r in found if r.storage == "float32"}

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        gpu = WAITS if (row.gaps or 0) > 0.5 else f"{row.gpu_us:,.{int((row.gpu_us or 0) < 10)}f}"
        if row.percent_of_copy:
            return f"{gpu} ({row.percent_of_copy:.0f} %)"
        return f"{gpu} ({(row.wall_us or 0) / 1e3:.2f} ms)"

    body = [
        [
            f"{title}, {TITLES[rule]}",
            *(cell(times.get((layout, rule, name))) for name in (OURS, *RIVALS)),
        ]
        for layout, title in LAYOUTS.items()
        for rule in TITLES
        if (layout, rule, OURS) in times
    ]
    return f"{_machine(found)}\n\n{tables.markdown(('', OURS, *RIVALS), body)}"


def by_storage(found: Iterable[Row]) -> str:
    """What one layout takes in every storage: microseconds, and the share of a copy's bandwidth."""
    ours = [row for row in found if (row.layout, row.implementation) == (OF_FORMATS, OURS)]
    times = {(row.rule, row.storage): row for row in ours}
    names = [name for name in TITLES if any(name == key[0] for key in times)]

    def cell(rule: str, storage: str) -> str:
        row = times.get((rule, storage))
        return f"{row.gpu_us:,.0f} ({row.percent_of_copy:.0f} %)" if row else ""

    body = [
        [storage, *(cell(name, storage) for name in names)]
        for storage in ALL_STORAGES
        if any(storage == key[1] for key in times)
    ]
    head = ("", *(TITLES[name] for name in names))
    return f"{_machine(ours)}\n\n{tables.markdown(head, body)}"


def _machine(found: Sequence[Row]) -> str:
    row = found[-1]
    where = f"{row.gpu}, driver {row.driver}, torch {row.torch}, Triton {row.triton}"
    return tables.paragraph(f"{where}, {row.date[:10]}; microseconds, medians:")
