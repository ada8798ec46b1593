"""Writes the tables of the two READMEs that are made from perf/results/host-cpu.csv.

    python perf/readme_tables.py

Host time in triton_optim/README.md, and in perf/README.md what a step costs on many ranks, which is
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lab import host_report, markdown, scaling
from lab.host_rows import Row, read

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "perf" / "results" / "host-cpu.csv"
PARTS: dict[Path, tuple[str, Callable[[Sequence[Row]], str]]] = {
    ROOT / "triton_optim" / "README.md": ("host time", host_report.report),
    ROOT / "perf" / "README.md": ("scaling", scaling.table),
}


def texts() -> dict[Path, str]:
    """The files as they must be."""
    rows = read(ROWS)
    return {
        path: markdown.with_part(path.read_text(), name, make(rows))
        for path, (name, make) in PARTS.items()
    }


def main() -> None:
    for path, text in texts().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
