"""In which precision a model trains: the dtype of its parameters, and its optimizer's options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FLOAT32 = "float32"


class Precision(NamedTuple):
    """Dtype of parameters, and options of triton_optim's optimizers."""

    dtype: torch.dtype
    options: dict[str, Any]


PRECISIONS = {
    FLOAT32: Precision(torch.float32, {}),
    "bfloat16": Precision(torch.bfloat16, {}),
    "stochastic": Precision(torch.bfloat16, {"stochastic_rounding": True}),
    "exact": Precision(torch.bfloat16, {"master_weight_bits": 32}),
    "exact16": Precision(torch.bfloat16, {"master_weight_bits": 32, "state_dtype": torch.bfloat16}),
    "8bit": Precision(torch.bfloat16, {"master_weight_bits": 32, "state_dtype": "8bit"}),
}


def bytes_per_param(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Of parameters and of their state but single numbers, as they lie in memory."""
    params = [*model.parameters()]
    states = [
        value
        for param in params
        for value in optimizer.state[param].values()
        if isinstance(value, Tensor) and value.ndim
    ]
    return sum(x.nbytes for x in (*params, *states)) / sum(p.numel() for p in params)
