"""perf/audit_kernels.py: what the compiled kernels are held to, and that it would be noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from cases import CASES, DEVICE
from lab import interpreted_rows
from lab.audit import (
    DENSE_LIMITS,
    STEP_LIMITS,
    Audit,
    Measures,
    dense_report,
    findings,
    step_report,
)
from lab.gpus import GPUS
from lab.interpreted import flag_sets, measure
from torch.nn import Parameter

import triton_optim

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "perf/results/audit.json"
REWRITE = "python perf/audit_kernels.py --json perf/results/audit.json"
# Some of the kernels, and of steps by rows. All of them: `REWRITE` changes nothing then.
OPTIONS = {
    "dense": ("formats", "--every", "13"),
    "rows": ("--every", "40", "--arch", "sm_90", "gfx942"),
}

Run = tuple[subprocess.CompletedProcess[str], Audit]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """By kind of kernels."""
    found = {}
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for kind, options in OPTIONS.items():
        file = tmp_path_factory.mktemp("audit") / "audit.json"
        command = [sys.executable, "perf/audit_kernels.py", "--kinds", kind, *options]
        done = subprocess.run(
            [*command, "--json", str(file)],
            cwd=ROOT, env=compiling, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        found[kind] = done, Audit(**json.loads(file.read_text()))
    return found


@pytest.mark.parametrize("kind", OPTIONS)
def test_nothing_is_found(runs: dict[str, Run], kind: str) -> None:
    done, audit = runs[kind]
    kernels = [*audit.dense(), *audit.by_rows()]
    assert done.returncode == 0, done.stdout[done.stdout.rindex("\n\n") :]
    counts = f"{len(kernels)} kernels, {len(audit.row_steps)} steps by rows, 0 findings\n"
    assert done.stdout.endswith(counts)
    assert bool(audit.row_steps) == (kind == "rows")
    expected = {*GPUS} if kind == "dense" else {"sm_90", "gfx942"}
    assert {kernel.architecture for kernel in kernels} == expected
    for line in done.stdout.splitlines():
        assert len(line) <= 155  # of four flags


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_committed_baseline_holds(runs: dict[str, Run], kind: str) -> None:
    committed, compiled = COMMITTED, runs[kind][1]
    assert not committed.findings()
    if committed.triton != triton.__version__:
        here = triton.__version__
        pytest.skip(f"{BASELINE.name} is of Triton {committed.triton}, this is {here}")
    before, after = _by_name(committed), _by_name(compiled)
    assert after
    changed = [f"{row}\nwas {before.get(k)}" for k, row in after.items() if row != before.get(k)]
    assert not changed, "\n".join([f"if this is meant: {REWRITE}", *changed[:5]])


def _by_name(audit: Audit) -> dict[str, Measures]:
    kernels = (audit.kernels, audit.row_kernels)
    named = {f"{a} {n}": m for kind in kernels for a, of in kind.items() for n, m in of.items()}
    return {**named, **audit.row_steps}


COMMITTED = Audit(**json.loads(BASELINE.read_text()))
DENSE = COMMITTED.kernels["sm_90"]["adagrad - bf16/bf16/bf16"]
BY_ROWS = COMMITTED.row_kernels["sm_90"]["adagrad - sparse f32 64/4"]
ALONE = {**BY_ROWS, "multiple": 1, "adjacent": 1}
STEP = COMMITTED.row_steps["adagrad - f32 64 hot"]
ONCE = "elements not exactly once; 464896 are the floor."


@pytest.mark.parametrize(
    ("good", "fault", "finding"),
    [
        (DENSE, {"spills": 8}, "spills 8 bytes a thread; 0 are allowed."),
        (DENSE, {"narrowest_bits": 32},
         "has a load or store of 32 bits on its main path; 128 are asked for."),
        (DENSE, {"load_bits": 0, "store_bits": 0, "narrowest_bits": 0, "instructions": 0.0},
         "stores no whole block without a mask."),
        (DENSE, {"bytes_per_param": 10.2},
         "moves 10.200 bytes a parameter; 10 to 10.100 are allowed."),
        (DENSE, {"bytes_per_param": 9.9},
         "moves 9.900 bytes a parameter; 10 to 10.100 are allowed."),
        (DENSE, {"launches": 2}, "takes 2 update launches a step; 1 is allowed."),
        (DENSE, {"instructions": 62.0},
         "issues 62.0 instructions an element; 61.8 fit while memory moves it."),
        (BY_ROWS, {"spills": 8}, "spills 8 bytes a thread; 0 are allowed."),
        (ALONE, {"spills": 8}, None),
        (BY_ROWS, {"split": 8, "accesses": 20},
         "has 8 of 20 loads and stores of rows that are narrower than 4 elements or 128 bits."),
        (ALONE, {"adjacent": 4}, "has 4 elements next to each other a thread, loaded by 1."),
        (STEP, {"moved": 464640}, f"moves 464640 bytes of values and rows, 0 {ONCE}"),
        (STEP, {"astray": 64}, f"moves 464896 bytes of values and rows, 64 {ONCE}"),
        (STEP, {"keys": 18000, "order": 4096, "tables": 3725},
         "moves 25821 bytes of ids, keys, order and tables; 23552 are allowed."),
        (STEP, {"partials": 32769}, "moves 32769 bytes of partial sums; 32768 are allowed."),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) and len(value) < 5 else "",
)  # fmt: skip
def test_a_fault_is_a_finding(good: Measures, fault: Measures, finding: str | None) -> None:
    def found(measures: Measures) -> list[str]:
        kernels = {"sm_90": {"kernel": measures}}
        return Audit(
            "", kernels if good is DENSE else {}, kernels if good in (BY_ROWS, ALONE) else {},
            {"step": measures} if good is STEP else {},
        ).findings()  # fmt: skip

    assert found(good) == []
    name = "step" if good is STEP else "sm_90 kernel"
    assert found({**good, **fault}) == ([] if finding is None else [f"{name} {finding}"])


def test_what_a_misaligned_kernel_is_spared(runs: dict[str, Run]) -> None:
    """Its narrow loads, which would be findings were it aligned, but not its spills."""
    measured = [m for n, m in _by_name(runs["dense"][1]).items() if n.endswith(" misaligned")]
    assert len(measured) > 100
    for fault, said in (({}, ""), ({"alignment": 16}, "bits on its main path"),
                        ({"spills": 4}, "spills")):  # fmt: skip
        for measures in measured:
            report = dense_report("sm_80", "", {**measures, **fault})
            assert said in " ".join(findings(report, DENSE_LIMITS)[:1])
            assert fault or not findings(report, DENSE_LIMITS)


def test_every_flag_set_is_reached() -> None:
    """Those of the cases, and as many as the switches give."""
    reached = {}
    for name in triton_optim.OPTIMIZERS:
        make = getattr(triton_optim, name)
        optimizers = [make([Parameter(torch.empty(1))], **kwargs) for kwargs in flag_sets(name)]
        reached[name] = {
            optimizer._current_rule().active_flags(optimizer.param_groups[0])
            for optimizer in optimizers
        }
    for name, number in {"SGD": 10, "Adagrad": 6, "RMSprop": 10, "Adam": 8}.items():
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


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")
def test_a_step_by_rows_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand where that can be done."""
    monkeypatch.undo()
    measured = interpreted_rows.measure("RowwiseAdagrad", {}, torch.bfloat16, 256, "uniform")
    step = step_report(*measured)
    assert step.name == "rowwise_adagrad - bf16 256 uniform"
    assert step.programs == 32
    assert step.floor == step.moved == 128 * 256 * 2 + 2 * step.rows * (256 * 2 + 4)
    assert step.astray == 0
    assert step.order == 8 * 128
    assert findings(step, STEP_LIMITS) == []
