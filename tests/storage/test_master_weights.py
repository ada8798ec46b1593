"""Float32 values of bfloat16 parameters: the same as in float32, whatever is done to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import CASES, DEVICE, SCALARS, Case, Spec, Tensors, each
from lion import Lion
from remainders import joined
from small_tensors import SMALL
from torch import Tensor
from torch.nn import Parameter

import triton_optim

SMALL_AND_UNLIKE = (
    *SMALL,
    Spec("grad-unlike", lambda draw: draw(6, 11), lambda draw: draw(11, 6).t()),
)
Make = Callable[..., Any]


def train_both(make: Make, steps: int, specs: tuple[Spec, ...] = SMALL_AND_UNLIKE) -> None:
    """In bfloat16 with remainders, and in float32, from the same gradients."""
    exact = Tensors(torch.bfloat16, torch.float32, specs)
    ours = Tensors(torch.bfloat16, torch.bfloat16, specs)
    theirs, optimizer = make(exact.params), make(ours.params, master_weight_bits=32)
    for _ in range(steps):
        for tensors, stepped in ((exact, theirs), (ours, optimizer)):
            tensors.new_gradients()
            stepped.step()
    for p, q in zip(exact.params, ours.params, strict=True):
        state = optimizer.state[q]
        assert_same_bits(joined(q, state), p.detach())
        assert ((q - p).abs() <= p.bfloat16().abs() / 256 + 1e-30).all()
        for key, value in theirs.state[p].items():
            if isinstance(value, Tensor) and key not in SCALARS:
                assert_same_bits(state[key], value)


@each(CASES)
def test_steps_are_those_of_float32(case: Case) -> None:
    train_both(case.ours, steps=4)


@pytest.mark.interpreted
def test_those_of_ones_own_rule() -> None:
    """Compiled, it leaves the choice of which product is fused, and two kernels choose apart."""
    train_both(Lion, steps=4)


@each([case for case in CASES if "-" not in case.name])
def test_many_steps(case: Case) -> None:
    """1,000 with `HYPOTHESIS_PROFILE=soak`: what is stored is what was computed, step by step."""
    steps = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 40
    train_both(case.ours, steps, (Spec("one", lambda draw: draw(5)),))


def test_nan_and_infinities_stay_visible() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 3.38e38], device=DEVICE)
    param = Parameter(values.bfloat16())
    optimizer = triton_optim.SGD([param], lr=1.0, master_weight_bits=32)
    param.grad = torch.tensor([torch.nan, torch.inf, 1.0, -3.0e38], device=DEVICE).bfloat16()
    optimizer.step()
    assert param.isnan().tolist() == [True, False, False, False]
    assert param[1] == -torch.inf
    assert param[3] == torch.inf
    optimizer.step()
    assert param[0].isnan()
    assert param[1] == -torch.inf
