"""Faults of compilation, planted in the kernels' PTX: each is noticed, or changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import on_ptx
import pytest
import torch
from cases import BLOCK
from embedding_tables import Tables
from faulty_texts import Mutant, survivors
from guarded_memory import guarded
from ptx_machine.grid import Launch
from torch.nn import Parameter

import triton_optim

pytestmark = pytest.mark.ptx


def _dense(dtype: torch.dtype, state: torch.dtype) -> Callable[[], object]:
    """A step over two groups: a whole chunk and a long rest, and less than a thread has each."""
    params = [Parameter(guarded(torch.randn(n).to(dtype))) for n in (2 * BLOCK - 24, 50)]
    groups = [{"params": [param], "lr": 0.1 * (i + 1)} for i, param in enumerate(params)]
    optimizer = triton_optim.Adagrad(groups)
    for param in params:
        optimizer.state[param]["sum"] = guarded(torch.rand(param.shape).to(state))
        param.grad = torch.randn_like(param)
    return optimizer.step


def _norm() -> Callable[[], object]:
    params = [Parameter(guarded(torch.randn(n))) for n in (20 * BLOCK + 48, 7, 1)]
    for param in params:
        param.grad = torch.randn_like(param)
    return lambda: triton_optim.clip_grad_norm_(params, 1.0)


def _rows() -> Callable[[], object]:
    tables = Tables([(40, 5)], torch.float32)
    optimizer = triton_optim.Adagrad(tables.params, lr=0.1)
    tables.new_gradients([700], hot=400)
    return optimizer.step


SCENARIOS: dict[str, tuple[str, Callable[[], Callable[[], object]]]] = {
    "float32": ("multi_tensor_kernel", lambda: _dense(torch.float32, torch.float32)),
    "bfloat16 and float32": ("multi_tensor_kernel", lambda: _dense(torch.bfloat16, torch.float32)),
    "norm": ("norm_kernel", _norm),
    "rows": ("rows_kernel", _rows),
}
# Faults that change no result, by scenario: the fault, the statement and why.
EQUIVALENT: dict[str, dict[tuple[str, str], str]] = {name: {} for name in SCENARIOS}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_is_noticed(name: str) -> None:
    kernel, prepare = SCENARIOS[name]
    step = prepare()
    found: list[tuple[int, list[Mutant]]] = []

    def try_all(launch: Launch) -> None:
        if launch.code.kernel.name == kernel and not found:
            found.append(survivors(launch))

    gpu = on_ptx.machine()
    gpu.before = try_all
    try:
        step()
    finally:
        gpu.before = None
    ((tried, left),) = found
    assert tried > 10
    for m in left:
        print("SURV", name, tried, m.fault, "|", m.statement, "|", m.instruction, "|", m.changed)
    assert not [
        mutant for mutant in left if (mutant.fault, mutant.statement) not in EQUIVALENT[name]
    ]
