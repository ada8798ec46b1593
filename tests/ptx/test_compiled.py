"""What only compiled kernels show, beside the suite that runs them: see README.md."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import on_ptx
import pytest
import torch
import triton
from assertions import assert_same_bits
from cases import BLOCK, CASES, Case, each
from guarded_memory import guarded
from lab.compiled import rule_and_flags, short
from ptx_machine.access import Access
from ptx_machine.grid import Run
from ptx_machine.operations import OPERATIONS
from ptx_machine.parser import UnknownPTX
from ptx_machine.sectors import total
from torch.nn import Parameter

import triton_optim
from triton_optim.kernels.multi_tensor import multi_tensor_kernel
from triton_optim.launch.launcher import UpdateLaunch, record_launches

pytestmark = pytest.mark.ptx

COUNTS = Path(__file__).parents[2] / "perf/results/executed.json"  # beside audit.json
COUNTED = (
    "sgd", "sgd-momentum", "sgd-nesterov", "adagrad", "rmsprop", "rmsprop-momentum",
    "rmsprop-centered", "rmsprop-all", "adam", "adam-amsgrad", "adamw", "adamax", "nadam", "radam",
    "adadelta", "rprop", "asgd",
)  # fmt: skip
# Of bfloat16, beside float32 and bfloat16 of all of the above.
COUNTED_FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adamw", {"master_weight_bits": 32}),
    ("adamw", {"master_weight_bits": 32, "state_dtype": torch.bfloat16}),
    ("adamw", {"stochastic_rounding": True}),
    ("rmsprop", {"master_weight_bits": 32, "state_dtype": torch.bfloat16}),
    ("rmsprop", {"stochastic_rounding": True}),
    ("adagrad", {"stochastic_rounding": True}),
    ("sgd-momentum", {"stochastic_rounding": True}),
    *((n, {"master_weight_bits": 32, "state_dtype": "8bit"}) for n in ("adamw", "sgd-momentum")),
    *((n, {"stochastic_rounding": True, "state_dtype": "8bit"}) for n in ("rmsprop", "adagrad")),
)
CHUNKS = 2


def test_what_is_executed_is_compiled() -> None:
    gpu = on_ptx.machine()
    before = gpu.n_launches
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    CASES[0].ours([param]).step()
    assert gpu.n_launches == before + 1
    assert gpu.architecture.startswith("sm_")


def test_an_unknown_instruction_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    multi_tensor_kernel.device_caches.clear()  # so that it is loaded anew
    monkeypatch.delitem(OPERATIONS, "sqrt.rn.f32")
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.raises(UnknownPTX, match=r"sqrt\.rn\.f32 .*numerics\.py:"):
        triton_optim.Adagrad([param]).step()
    assert bool((param == 1).all())


@each(CASES)
def test_an_element_has_the_same_bits_in_a_whole_chunk_and_in_the_last(case: Case) -> None:
    values, grads = torch.randn(BLOCK), torch.randn(2, BLOCK)
    whole, short = Parameter(values.clone()), Parameter(values[:-1].clone())
    optimizer = case.ours([whole, short])
    for grad in grads:
        whole.grad, short.grad = grad.clone(), grad[:-1].clone()
        optimizer.step()
    assert_same_bits(whole.detach()[:-1], short.detach())


@pytest.mark.parametrize("width", [5, 7])
def test_lanes_that_hold_one_row_agree_on_its_sum(width: int) -> None:
    param = Parameter(guarded(torch.randn(100, width)))
    param.grad = torch.randn_like(param)
    triton_optim.RowwiseAdagrad([param], lr=0.1, fused=True).step()


def _counts(case: Case, dtype: torch.dtype, **options: Any) -> tuple[str, dict[str, float]]:
    """Of whole chunks: instructions an element, and what requests of tensors' memory touch."""
    param = Parameter(torch.randn(CHUNKS * 2048).to(dtype))
    param.grad = torch.randn_like(param)
    runs: list[Run] = []
    gpu = on_ptx.machine()
    gpu.after.append(runs.append)
    try:
        with record_launches() as launches:
            case.ours([param], fused=True, **options).step()
    finally:
        gpu.after.pop()
    (launch,) = (launch for launch in launches if isinstance(launch, UpdateLaunch))
    run = runs[-1]
    instructions = sum(p.n_instructions * p.n_threads for p in run.programs) / param.numel()
    requests = total(access for access in run.memory.log if _is_of_a_tensor(access))
    variant = launch.variant
    dtypes = (variant.param_dtype, variant.grad_dtype, variant.state_dtype)
    name = f"{rule_and_flags(launch._rule.name, variant.flags)} {'/'.join(map(short, dtypes))}"
    return name, {
        "executed": round(instructions, 2),
        "sectors": round(requests.sectors / requests.number, 2),
        "least_sectors": round(requests.least / requests.number, 2),
    }


def _is_of_a_tensor(access: Access) -> bool:
    """And not one number of a table, which all threads load."""
    return bool((access.addresses != access.addresses[0]).any())


def test_counts() -> None:
    """As committed. After a change of a kernel: WRITE_COUNTS=1, and look at the diff."""
    if on_ptx.machine().architecture != "sm_90" or not triton.__version__.startswith("3.7"):
        pytest.skip("the committed counts are of sm_90 and Triton 3.7")
    found: dict[str, Any] = dict(
        _counts(case, dtype)
        for case in CASES
        if case.name in COUNTED
        for dtype in (torch.float32, torch.bfloat16)
    )
    cases = {case.name: case for case in CASES}
    found |= dict(_counts(cases[n], torch.bfloat16, **how) for n, how in COUNTED_FORMATS)
    if "WRITE_COUNTS" in os.environ:
        rows = (f'"{name}": {json.dumps(row)}' for name, row in found.items())
        COUNTS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    assert found == json.loads(COUNTS.read_text())
    for name, row in found.items():
        # Of float32 beside 16 bits a thread's 8 elements are two loads, which use half a sector.
        assert row["sectors"] == row["least_sectors"] or name.endswith("r/bf16/f32"), name
