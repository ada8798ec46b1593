"""The benchmark of host time: what is stepped, its file, its plot, and what the READMEs say of it.

No time is asserted, and all numbers here are made up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import plot
import pytest
import readme_tables
from lab import host_rows, host_tensors, tables
from lab.host_rows import DTENSOR, PARAMS, PLAIN, Row
from lab.host_steps import Case, measure
from lab.rules import TITLES

from triton_optim.tensors.sharding import is_dtensor, local, spec_of


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with host_tensors.one_process():
        yield


@pytest.mark.parametrize("kind", PARAMS)
def test_gradients_come_and_go(kind: str) -> None:
    params = host_tensors.parameters(8, kind)
    host_tensors.new_gradients(params, params)
    before = [local(param.grad) for param in params if param.grad is not None]
    drawn = random.Random(0)
    halves = [host_tensors.half(params, drawn) for _ in range(4)]
    assert len({tuple(map(id, chosen)) for chosen in halves}) > 1
    for chosen in halves:
        host_tensors.new_gradients(params, chosen)
        given = [param for param in params if param.grad is not None]
        assert [*map(id, given)] == [*map(id, chosen)] and len(given) == 4
        for param in given:
            assert param.grad is not None
            assert is_dtensor(param) == is_dtensor(param.grad) == (kind == DTENSOR)
            assert all(local(param.grad) is not old for old in before)
            assert (local(param.grad) == 2).all()
            assert kind == PLAIN or spec_of(param.grad) is spec_of(param)


@pytest.mark.parametrize(("params", "gradients"), [*product(PARAMS, host_rows.GRADIENTS)])
def test_every_case_is_measured(params: str, gradients: str) -> None:
    """Ours runs in the interpreter here, once a repeat."""
    rows = measure(Case("momentum", 10, params, gradients), 3, 0.0)
    names = {row.implementation for row in rows}
    assert names == {*host_rows.SERIES} - ({"fused"} if params == DTENSOR else set())
    for row in rows:
        assert (row.params, row.gradients, row.tensors, row.repeats) == (params, gradients, 10, 3)
        assert 0 < row.p20 <= row.median <= row.p80


def _rows() -> list[Row]:
    """Microseconds that tell the columns apart: tensors, rule, parameters, implementation."""
    rows = []
    for (i, rule), (k, params), n in product(
        enumerate(TITLES), enumerate(PARAMS), (10, 300, 1000, 20_000)
    ):
        for gradients, (j, name) in product(host_rows.GRADIENTS, enumerate(host_rows.SERIES)):
            us = n + 1000 * j + 100_000 * i + 10_000 * k + 0.25
            rows.append(Row("m", rule, params, n, 1, gradients, name, 3, us, us, us))
    ours = {"implementation": "triton_optim", "params": PLAIN, "gradients": "fresh"}
    rows += [
        row._replace(groups=20, median=0.9 * row.median) for row in host_rows.found(rows, **ours)
    ]
    for name, us in zip(host_rows.LAUNCHES, (4.0, 19.0), strict=True):
        rows.append(Row("m", "sgd", PLAIN, 10, 1, "stay", name, 200, us, us, us))
    for k, rule in enumerate(("sgd", "adagrad", "rmsprop")):
        for name, us in (("triton_optim", 7e5 + 2e5 * k), ("foreach", 4e6 + 1e6 * k)):
            rows.append(Row("m", rule, DTENSOR, 100, 1, "cold", name, 1, us, us, us))
    return rows


def test_the_report_shows_each_time_in_its_place() -> None:
    text = readme_tables.report(_rows()).replace("\n", " ")
    assert "| SGD | 300 | 300 | 1,300 | 2,300 | 3,300 | 4,300 |" in text
    assert "| Adagrad | 300 DTensors | 210,300 | 211,300 | 212,300 | 213,300 | 214,300 |" in text
    assert "| changing | 20,000 DTensors | 330,000 | 331,000 |" in text
    assert "changed our time by -10 %, in the median of 24 pairs" in text
    assert "4 us directly and 19 us by Triton's launcher" in text
    assert "took 0.7 s over 100 DTensors, and 0.9 to 1.1 s with each further rule" in text
    assert "shardings then, 4.0 s, and 5.0 to 6.0 s." in text
    without = [row for row in _rows() if row.implementation != "fused"]
    assert "| SGD | 300 | 300 | 1,300 | none | 3,300 | 4,300 |" in readme_tables.report(without)


def test_rows_survive_their_file_and_are_drawn_from_it(tmp_path: Path) -> None:
    path, rows = tmp_path / "host-made-up.csv", host_rows.found(_rows(), rule="sgd", groups=1)
    host_rows.write(path, rows)
    assert host_rows.read(path) == rows
    assert plot.main([str(path), "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "host-made-up.png").read_bytes().startswith(b"\x89PNG")
    path.write_text("machine,rule\nm,sgd\n")
    with pytest.raises(ValueError, match="other columns"):
        host_rows.read(path)


def test_a_part_of_a_file_is_replaced() -> None:
    text = "a\n<!-- x, by perf/readme_tables.py -->\nold\n<!-- end of x -->\nb\n"
    assert tables.with_part(text, "x", r"new \1") == text.replace("old", r"new \1")
    for bad in ("", text + text, text.replace("end of", "")):
        with pytest.raises(ValueError, match="not one part"):
            tables.with_part(bad, "x", "new")


def test_the_readmes_are_those_of_the_committed_rows() -> None:
    """`python perf/readme_tables.py` writes them."""
    for path, text in readme_tables.texts().items():
        assert path.read_text() == text, path
