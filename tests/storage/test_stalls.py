"""Updates of less than half a unit: lost to nearest, right in the mean when rounded stochastically.

By Adagrad on gradients of 1: its sum counts the steps, and bfloat16 cannot count beyond 256.
100,000 steps with `HYPOTHESIS_PROFILE=soak`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import Tensor
from torch.nn import Parameter

from triton_optim import Adagrad
from triton_optim.launch import backend

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
STEPS = 100_000 if SOAK else 300
NUMEL = 1024
LR = 2.0**-10  # of parameters that start at 1, below which a unit is 2^-8
UNIT = 2.0**-7  # of bfloat16, beside a number of the power of 2 below
FROZEN = 256  # + 1 is halfway to the next number, and the even one is taken
# Of the mean over all elements. What is drawn is the same in every run.
STANDARD_ERRORS = 4


@pytest.fixture(autouse=True)
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (NUMEL,))


def trained(dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    """The parameter and the sum."""
    param = Parameter(torch.ones(NUMEL, dtype=dtype, device=DEVICE))
    optimizer = Adagrad([param], lr=LR, **options)
    param.grad = torch.ones_like(param)
    for _ in range(STEPS):
        optimizer.step()
    return param.detach().double(), optimizer.state[param]["sum"].double()


def test_to_nearest_both_freeze() -> None:
    param, sum_ = trained(torch.bfloat16)
    assert bool((param == 1).all())
    assert bool((sum_ == FROZEN).all())


def test_stochastically_both_go_on() -> None:
    """Within the statistical error of the mean: a step's variance is below update times unit."""
    param, sum_ = trained(torch.bfloat16, stochastic_rounding=True)
    moved = sum(LR / k**0.5 for k in range(1, STEPS + 1))
    print(f"{STEPS} steps: sum {float(sum_.mean()):.2f}, moved {float(1 - param.mean()):.6f}, "
          f"{moved:.6f} in real numbers")  # fmt: skip
    error = (STEPS**2 / 2 * UNIT / NUMEL) ** 0.5
    assert abs(float(sum_.mean()) - STEPS) < STANDARD_ERRORS * error
    error = (moved * UNIT / 2 / NUMEL) ** 0.5
    assert abs(float(1 - param.mean()) - moved) < STANDARD_ERRORS * error


def test_with_a_remainder_the_parameter_is_float32s() -> None:
    """But for half a unit, which the remainder holds; the sum is float32."""
    param, sum_ = trained(torch.bfloat16, master_weight_bits=32)
    exact, _ = trained(torch.float32)
    assert bool((sum_ == STEPS).all())
    assert bool((exact < 1 - STEPS**0.5 * LR).all())
    assert bool(((param - exact).abs() <= 2.0**-9).all())
