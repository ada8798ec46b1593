"""Tables as text and in Markdown, and files of which a part is generated."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

WIDTH = 100  # of the meanings
INDENT = 10


class Column(NamedTuple):
    head: str
    form: str  # of its cells, such as ">6.1f"
    value: str | Callable[[Any], object]  # an attribute of a row, or what makes it of a row
    meaning: str = ""

    @property
    def title(self) -> str:
        return self._padded(self.head)

    def cell(self, row: Any) -> str:
        """Empty where there is no value."""
        value = getattr(row, self.value) if isinstance(self.value, str) else self.value(row)
        return self._padded("") if value is None else format(value, self.form)

    def _padded(self, text: str) -> str:
        return format(text, re.sub(r"\..*|[a-z]$", "", self.form))


def print_table(columns: Sequence[Column], rows: Iterable[Any]) -> None:
    print("".join(column.title for column in columns))
    for row in rows:
        print("".join(column.cell(row) for column in columns))


def print_legend(columns: Sequence[Column]) -> None:
    print()
    for column in columns:
        head = format(column.head, f"<{INDENT}")
        print(textwrap.fill(column.meaning, WIDTH, initial_indent=head,
                            subsequent_indent=" " * INDENT))  # fmt: skip


def markdown(head: Sequence[str], body: Iterable[Iterable[str]]) -> str:
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
