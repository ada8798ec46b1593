"""The benchmark of steps on a machine without a GPU: all but our kernels is timed.

No time is asserted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab import dry_embeddings, rows, suites
from lab.bench import bench
from lab.device import Host
from lab.embedding_tables import Tables
from lab.group import Group
from lab.rows import COPY, OURS, TORCH_SPARSE, Row
from lab.rules import ADAGRAD, EMBEDDING_RULES, STORAGES

ROOT = Path(__file__).parents[2]
TINY = Tables(50, 8, 40, "zipf", tables=2)


def test_a_cpu_times_all_but_ours() -> None:
    host = Host(1 << 40)
    group = Group("", TINY._replace(tables=1), ADAGRAD, STORAGES[0])
    for only_check in (False, True):
        measured = bench(host, group, Row(), 2, 0.0, only_check=only_check)
        found = {row.implementation: row for row in measured}
        assert COPY not in found
        assert found[OURS].wall_us is found[TORCH_SPARSE].gpu_us is None
        assert (found[TORCH_SPARSE].wall_us is None) == only_check
        assert (found[OURS].error is None) != only_check
        assert found[TORCH_SPARSE].status == (rows.RIGHT if only_check else rows.OK)
    assert Host(1000).free_bytes() < 0


def _printed(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "perf/bench_step.py", "--suite", "embeddings-tiny", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    printed = _printed("--repeats", "2", "--out", str(tmp_path))
    assert "goals" not in printed and "GPU: none" in printed
    (path,) = tmp_path.iterdir()
    measured = rows.read(path)
    ours = [row for row in measured if row.implementation == OURS]
    on_cpu = [row for row in ours if row.gpu == "none"]
    n_shapes = len(suites.SUITES["embeddings-tiny"]())
    assert len(on_cpu) == n_shapes * len(EMBEDDING_RULES)
    assert {row.status for row in on_cpu} == {rows.NOT_AVAILABLE}
    assert not any(row.wall_us or row.gpu_us for row in ours)
    dry = [row for row in ours if row.gpu != "none"]
    assert [row.tensors for row in dry] == [1] * len(EMBEDDING_RULES) + [26] * len(EMBEDDING_RULES)
    assert {row.status for row in dry} == {rows.OK}, [row.detail for row in dry]
    assert all(row.host_us and row.suite == dry_embeddings.SUITE for row in dry)
    assert any(row.wall_us for row in measured if row.implementation == TORCH_SPARSE)


def test_only_checking() -> None:
    printed = _printed("--check")
    assert not re.search(r"\d+\.\d+-\d", printed) and "wrote" not in printed
    n_shapes = len(suites.SUITES["embeddings-tiny"]())
    right = re.findall(rf"  {OURS} +right \(error ", printed)
    assert len(right) == n_shapes * len(EMBEDDING_RULES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_benchmark_says_so_and_writes_nothing() -> None:
    before = {*(ROOT / "perf").glob("results/*")}
    command = [sys.executable, "perf/bench_step.py", "--suite", "gpt2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bench_step.py times a GPU, and torch sees none here.\n"
    assert {*(ROOT / "perf").glob("results/*")} == before
