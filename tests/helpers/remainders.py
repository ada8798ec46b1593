"""bfloat16 parameters with remainders, and the float32 values that both are."""

from __future__ import annotations

from typing import Any

import torch
from cases import DEVICE
from torch import Tensor
from torch.nn import Parameter

import triton_optim


def joined(param: Tensor, state: dict[str, Any]) -> Tensor:
    """Bit by bit, the float32 value of a parameter."""
    high = param.detach().clone(memory_format=torch.preserve_format).view(torch.int16).int()
    remainder: Tensor = state["param_remainder"]
    return ((high << 16) + remainder.int()).view(torch.float32)


def stepped(n: int = 20) -> tuple[Parameter, Any]:
    """A parameter whose values are no bfloat16, and its optimizer."""
    values = torch.linspace(1, 2, n, device=DEVICE).bfloat16()
    param = Parameter(values)
    optimizer = triton_optim.SGD([param], lr=1e-4, master_weight_bits=32)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["param_remainder"].count_nonzero() == n
    return param, optimizer


def copy_in_place(param: Parameter) -> None:
    with torch.no_grad():
        param.copy_(torch.full_like(param, 3))
