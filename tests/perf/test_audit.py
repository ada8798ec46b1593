"""perf/audit_kernels.py: what the compiled kernels are held to, and that it would be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from cases import CASES, DEVICE
from lab.gpus import GPUS
from lab.interpreted import flag_sets, measure
from lab.kernel_report import Row, findings, from_json
from torch.nn import Parameter

import triton_optim

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "perf/results/audit.json"
REWRITE = "python perf/audit_kernels.py --json perf/results/audit.json"

Audit = tuple[subprocess.CompletedProcess[str], list[Row]]


def _compiling() -> dict[str, str]:
    """The environment of a process in which Triton does not interpret."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """All kernels on sm_90, and each seventh on the other three."""
    file = tmp_path_factory.mktemp("audit") / "audit.json"
    command = [sys.executable, "perf/audit_kernels.py", "--every", "7", "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=_compiling(), capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done, from_json(file.read_text())[1]


def test_nothing_is_found(audit: Audit) -> None:
    done, rows = audit
    assert done.returncode == 0, done.stdout[done.stdout.rindex("\n\n") :]
    assert done.stdout.endswith(f"{len(rows)} kernels, 0 findings\n")
    assert {row.architecture for row in rows} == {*GPUS}
    for line in done.stdout.splitlines():
        assert len(line) <= 140


def test_the_committed_baseline_holds(audit: Audit) -> None:
    version, rows = from_json(BASELINE.read_text())
    assert not [finding for row in rows for finding in findings(row)]
    if version != triton.__version__:
        pytest.skip(f"{BASELINE.name} is of Triton {version}, this is {triton.__version__}")
    committed = {row[:2]: row for row in rows}
    compiled = {row[:2]: row for row in audit[1]}
    changed = [
        f"{row}\nwas {committed.get(k)}" for k, row in compiled.items() if row != committed.get(k)
    ]
    changed += [f"{k} is gone" for k in committed if k[0] == "sm_90" and k not in compiled]
    assert not changed, "\n".join([f"if this is meant: {REWRITE}", *changed[:5]])


GOOD = Row(
    "sm_90", "adagrad - bf16/bf16/bf16", 16, 56, 0, 0, 128, 128, 128, 39.5, 176.2, 32, 49152, 10.04,
    10, 1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ({"spills": 8}, "spills 8 bytes a thread; 0 are allowed."),
        ({"narrowest_bits": 32}, "a load or store of 32 bits on its main path; 128 are asked for."),
        (
            {"load_bits": 0, "store_bits": 0, "narrowest_bits": 0, "instructions": 0.0},
            "stores no whole block without a mask.",
        ),
        ({"bytes_per_param": 10.2}, "moves 10.200 bytes a parameter; 10 to 10.100 are allowed."),
        ({"bytes_per_param": 9.9}, "moves 9.900 bytes a parameter; 10 to 10.100 are allowed."),
        ({"launches": 2}, "takes 2 update launches a step; 1 is allowed."),
        (
            {"instructions": 62.0},
            "issues 62.0 instructions an element; 61.8 fit while memory moves it.",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_fault_is_a_finding(fault: dict[str, float], finding: str) -> None:
    assert findings(GOOD) == []
    found = findings(GOOD._replace(**fault))  # type: ignore[arg-type]
    assert len(found) == 1
    assert found[0].startswith("sm_90 adagrad - bf16/bf16/bf16 ")
    assert found[0].endswith(finding)


def test_what_a_misaligned_kernel_is_spared(audit: Audit) -> None:
    """Its narrow loads, which would be findings were it aligned, but not its spills."""
    misaligned = [row for row in audit[1] if row.kernel.endswith(" misaligned")]
    assert len(misaligned) > 100
    for row in misaligned:
        assert findings(row) == []
        assert "bits on its main path" in findings(row._replace(alignment=16))[0]
        assert "spills" in findings(row._replace(spills=4))[0]


EXAMINE = """
import sys
sys.path[:0] = sys.argv[1:]
from audit_kernels import examine
from lab.interpreted import Step
from lab.kernel_report import findings
from triton_optim.launch import backend
variant = backend.Variant(frozenset(), 1, "float32", "float32", "float32", True, False)
for row in examine("sm_90", [Step("adagrad_rule", variant, 4, 20.08, 1)]):
    print(*findings(row))
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "finding"),
    [
        ("kernels/multi_tensor.py", "MASKED=False", "MASKED=True", "32 bits on its main path"),
        ("kernels/multi_tensor.py", "if remaining >=", "if -1 >=", "without a mask"),
        ("kernels/chunks.py", "if ALIGNED:", "if False:", "32 bits on its main path"),
        ("triton_optim/launch/backend.py", '{"num_warps"', '{"maxnreg": 32, "num_warps"', "spills"),
        (
            "kernels/rules.py",
            "    sum = state[0] + grad * grad",
            "    sum = state[0] + grad * grad\n"
            "    for _ in tl.static_range(8):\n"
            "        sum = div(sqrt(sum), param)",
            "instructions an element",
        ),
    ],
    ids=["masked", "nothing but the end", "no alignment", "few registers", "more arithmetic"],
)
def test_a_changed_kernel_is_found(
    file: str, old: str, new: str, finding: str, tmp_path: Path
) -> None:
    """From source to finding, for Adagrad in float32."""
    for name in ("kernels", "perf", "triton_optim"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    source = (tmp_path / file).read_text()
    assert source.count(old) >= 1
    (tmp_path / file).write_text(source.replace(old, new, 1))
    command = [sys.executable, "-c", EXAMINE, str(tmp_path), str(tmp_path / "perf")]
    done = subprocess.run(
        command, cwd=tmp_path, env=_compiling(), capture_output=True, text=True, check=True
    )
    assert finding in done.stdout


def test_every_flag_set_is_reached() -> None:
    """Those of the cases, and as many as the switches give."""
    reached = {}
    for name in triton_optim.OPTIMIZERS:
        make = getattr(triton_optim, name)
        optimizers = [make([Parameter(torch.empty(1))], **kwargs) for kwargs in flag_sets(name)]
        reached[name] = {
            optimizer.rule.active_flags(optimizer.param_groups[0]) for optimizer in optimizers
        }
    for name, number in {"SGD": 8, "Adagrad": 4, "RMSprop": 8}.items():
        assert len(reached[name]) == number
    for case in CASES:
        optimizer = case.ours([Parameter(torch.empty(1))])
        assert optimizer.rule.active_flags(optimizer.param_groups[0]) in reached[case.optimizer]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")
def test_a_step_is_measured() -> None:
    step = measure(
        "sm_90", "SGD", {"momentum": 0.5}, (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    assert step.name == "sgd MOMENTUM bf16/bf16/f32"
    assert step.launches == 1
    assert 14 < step.bytes_per_param < 14.14
