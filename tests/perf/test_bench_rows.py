"""What is made of measured rows: goals, files and plots. All numbers here are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plot
import pytest
from lab import report, rows
from lab.implementations import IMPLEMENTATIONS
from lab.rows import COPY, MIXED_COPY, OURS
from lab.rules import RULES


def _row(name: str, us: float, **columns: Any) -> rows.Row:
    """A made-up row; no machine gave it."""
    made_up = {
        "date": "2000-01-01", "gpu": "made-up", "suite": "sweep", "layout": "1000x1024",
        "params": 1_024_000, "rule": "adagrad", "storage": "float32", "implementation": name,
        "status": rows.OK, "gpu_us": us, "wall_us": 2 * us, "step_bytes": 20_480_000,
        "gb_per_s": 20_480 / us, "copy_gb_per_s": 4000.0, "model_bytes": 12_288_000,
        "peak_bytes": 12_288_000,
    }  # fmt: skip
    return rows.Row(**{**made_up, **columns})


def test_goals_are_judged_by_the_worst_row() -> None:
    large = {"layout": "10x100M", "params": 1_000_000_000, "model_bytes": 12_000_000_000,
             "peak_bytes": 12_000_000_000}  # fmt: skip
    measured = [
        _row(OURS, 10.0),
        _row("torch fused", 31.0),
        _row("torch foreach", 9.0),
        _row(OURS, 100.0, percent_of_copy=96.0, **{**large, "peak_bytes": 12_011_000_000}),
        _row("torch foreach", 260.0, **large),
        _row(OURS, 100.0, percent_of_copy=94.9, **{**large, "layout": "llama3-8b", "suite": "l"}),
        _row("torch compiled", 1.0, **{**large, "status": rows.WRONG}),
    ]
    found = {goal.text: goal for goal in report.judged(measured)}
    assert [(goal.met, goal.reached.split(" (")[0]) for goal in found.values()] == [
        (False, "94.9 %"),
        (False, "0.90x"),
        (False, "0.90x"),
        (True, "2.60x"),
        (True, "3.10x"),
        (True, "3.10x"),
        (True, "0.092 %"),
    ]
    assert not [*report.judged([_row("torch fused", 1.0)])]


def _of_embeddings(rule: str, name: str, us: float, **columns: Any) -> rows.Row:
    """A made-up row; no machine gave it."""
    row = rows.Row(rule=rule, implementation=name, status=rows.OK, gpu_us=us, wall_us=us + 50)
    vars(row).update({"layout": "large", "batch": 1, "unique_rows": 100_000, **columns})
    return row


def test_goals_of_embeddings_are_judged_by_the_worst_row() -> None:
    found = [
        _of_embeddings("adagrad", OURS, 100, percent_of_copy=80.0),
        _of_embeddings("adagrad", rows.TORCH_SPARSE, 1000),
        _of_embeddings("rowwise-adagrad", OURS, 50, percent_of_copy=95.0),
        _of_embeddings(
            "adagrad", OURS, 10, percent_of_copy=30.0, layout="small", unique_rows=99_999
        ),
        _of_embeddings("adagrad", rows.TORCH_SPARSE, 950, layout="small"),
        _of_embeddings("sgd", rows.TORCH_SPARSE, 1, percent_of_copy=1.0),
        _of_embeddings("adagrad", COPY, 1, percent_of_copy=1.0),
        _of_embeddings("adagrad", OURS, 9, layout="wrong", status=rows.WRONG, percent_of_copy=1.0),
    ]
    found_goals = [*report.judged(found)]
    assert [(goal.met, goal.reached.split(" (")[0]) for goal in found_goals] == [
        (True, "10.00x"),
        (False, "7.00x"),
        (True, "20.00x"),
        (True, "10.50x"),
        (True, "80.0 %"),
    ]
    on_cpu = [
        _of_embeddings("adagrad", name, 1.0, gpu_us=None) for name in (OURS, rows.TORCH_SPARSE)
    ]
    assert not [*report.judged(on_cpu)]


def test_rows_survive_their_file(tmp_path: Path) -> None:
    table = rows.Table(tmp_path / "new folder" / "step-x.csv")
    first = _row(OURS, 0.1, detail='a, "b"', cold=True, launches=None)
    table.add([first])
    table.add([_row("torch fused", 3.5, error=1e-9)])
    assert rows.read(table.path) == table.rows
    first.launches = 1
    table.add()
    assert rows.read(table.path)[0].launches == 1
    table.path.write_text("gpu,time\nx,1\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.read(table.path)


def _sweep_of_rows() -> list[rows.Row]:
    """A made-up sweep; no machine gave it."""
    found = []
    for rule in RULES[:3]:
        for size in (1 << 10, 1 << 20, 1 << 30):
            columns = {"layout": f"1x{size}", "params": size, "step_bytes": 20 * size}
            for name, factor in ((OURS, 1.0), ("torch foreach", 3.0), ("bitsandbytes", 2.0)):
                us = factor * (5 + 20 * size / 4e6)
                found.append(
                    _row(name, us, rule=rule.name, gb_per_s=20 * size / us / 1e3, **columns)
                )
        columns = {"rule": rule.name, "layout": "1x1024", "params": 0}
        found.append(_row(COPY, 500.0, gb_per_s=4000.0, **columns))
        rate = 3900.0 if rule == RULES[0] else 3800.0
        found.append(_row(MIXED_COPY, 500.0, gb_per_s=rate, **columns))
    return found


def test_plots_are_drawn_from_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows.Table(tmp_path / "step-made-up.csv")
    table.add(_sweep_of_rows())
    assert plot.main([str(table.path), "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for kind in ("time-against-torch", "roofline"):
        picture = tmp_path / f"{kind}-made-up-float32.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"wrote {picture}\n" in printed


def test_a_plot_shows_each_implementation_against_the_best_of_torch() -> None:
    (picture,) = plot.pictures(_sweep_of_rows()).values()
    panel = plot.time_against_torch(picture).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in panel.get_lines()}
    assert lines["torch foreach"] == pytest.approx([1.0, 1.0, 1.0])
    assert lines[OURS] == pytest.approx([1 / 3] * 3)
    for panel, mixed in zip(plot.roofline(picture).axes[:2], (3900.0, 3800.0), strict=True):
        flat = {line.get_linestyle(): np.asarray(line.get_ydata()).tolist()
                for line in panel.get_lines() if line.get_color() == "black"}  # fmt: skip
        assert flat == {"--": [4000.0, 4000.0], ":": [mixed, mixed]}


def test_every_implementation_has_a_color_of_its_own() -> None:
    assert len(set(plot.COLORS.values())) == len(IMPLEMENTATIONS)


def test_a_picture_shows_the_latest_rows_that_have_a_time() -> None:
    later = _row(OURS, 2.0, date="2000-01-02")
    wrong = _row("torch fused", 1.0, status=rows.WRONG)
    (picture,) = plot.pictures([later, _row(OURS, 1.0), wrong]).values()
    assert list(picture.values()) == [later]


def test_a_plot_without_a_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert plot.main([]) == 1
    assert "bench_step.py writes them" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "no such file.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
