"""Markdown tables, and files of which a part is generated."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], body: Iterable[Iterable[str]]) -> str:
    rows = ([cell.replace("|", "/") for cell in line] for line in body)
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", line) for line in lines)


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def with_part(text: str, name: str, part: str) -> str:
    """The text with another part between the comments that name it.

    Raises:
        ValueError: it has no such comments, or several.
    """
    start, end = f"<!-- {name}, by perf/readme_tables.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}\n", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"not one part between {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{part}\n{end}\n", text)
