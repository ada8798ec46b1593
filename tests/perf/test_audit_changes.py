"""Kernels that are changed for the worse: perf/audit_kernels.py finds each, from its source on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Adagrad in float32.
DENSE = """
from audit_kernels import examine
from lab.audit import Audit
from lab.dense_kernels import Kernel
from triton_optim.launch import backend
from triton_optim.launch.variant import Variant
variant = Variant(frozenset(), "float32", "float32", ("float32",), True, False)
kernels = [Kernel("adagrad_rule", variant, 4, 20.08, 1)]
audit = Audit("", {"sm_90": dict(examine("sm_90", kernels))}, {}, {})
"""
ROWS = """
import torch
from audit_kernels import examine
from lab.audit import Audit
from lab.row_kernels import kernel_of
kernels = [kernel_of("Adagrad", {}, (torch.float32,) * 3, width) for width in (64, 63)]
audit = Audit("", {}, {"sm_90": dict(examine("sm_90", kernels))}, {})
"""
STEP = """
import torch
from lab.audit import Audit
from lab.interpreted_rows import measure
audit = Audit("", {}, {}, dict([measure("Adagrad", {}, torch.float32, 64, "hot")]))
"""
PRINT = "print(*audit.findings())"


@pytest.mark.parametrize(
    ("script", "file", "old", "new", "finding"),
    [
        (DENSE, "kernels/multi_tensor.py", "MASKED=False", "MASKED=True",
         "32 bits on its main path"),
        (DENSE, "kernels/multi_tensor.py", "if remaining >=", "if -1 >=", "without a mask"),
        (DENSE, "kernels/chunks.py", "if ALIGNED:", "if False:", "32 bits on its main path"),
        (DENSE, "triton_optim/launch/kernel_args.py", '{"num_warps"', '{"maxnreg": 32, "num_warps"',
         "spills"),
        (
            DENSE,
            "kernels/rules.py",
            "    sum = state[0] + grad * grad",
            "    sum = state[0] + grad * grad\n"
            "    for _ in tl.static_range(8):\n"
            "        sum = div(sqrt(sum), param)",
            "instructions an element",
        ),
        (ROWS, "kernels/chunks.py", "if ALIGNED:", "if False:", "narrower than 4 elements"),
        (
            ROWS,
            "kernels/rows.py",
            "width = tl.multiple_of(tl.load(tensor_ptr + WIDTH), MULTIPLE)",
            "width = tl.load(tensor_ptr + WIDTH)",
            "narrower than 4 elements",
        ),
        (
            ROWS,
            "kernels/rows.py",
            "slot.to(tl.int64)[:, None] * width + column",
            "slot.to(tl.int64)[:, None] * COLUMNS + column",
            "next to each other",
        ),
        (
            ROWS,
            "triton_optim/launch/row_launcher.py",
            "FOUR_PROGRAMS_REGISTERS = 128",
            "FOUR_PROGRAMS_REGISTERS = 64",
            "spills",
        ),
        (
            STEP,
            "kernels/rows.py",
            "updated = complete[:, None] & within",
            "updated = ends[:, None] & within",
            "not exactly once",
        ),
        (
            STEP,
            "kernels/rows.py",
            "partial[:, None] & within",
            "inside[:, None] & within",
            "bytes of partial sums",
        ),
    ],
    ids=[
        "masked", "nothing but the end", "no alignment", "few registers", "more arithmetic",
        "rows without alignment", "any width", "aligned sums", "few registers by rows",
        "rows twice", "all sums stored",
    ],
)  # fmt: skip
def test_a_changed_kernel_is_found(
    script: str, file: str, old: str, new: str, finding: str, tmp_path: Path
) -> None:
    for name in ("kernels", "perf", "triton_optim"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    source = (tmp_path / file).read_text()
    assert source.count(old) >= 1
    (tmp_path / file).write_text(source.replace(old, new, 1))
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "perf")])
    interpret = "1" if script is STEP else "0"
    done = subprocess.run(
        [sys.executable, "-c", script + PRINT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finding in done.stdout
