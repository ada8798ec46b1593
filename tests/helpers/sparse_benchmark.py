"""A tiny shape for the benchmark of sparse gradients, and torch's optimizers for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lab.sparse_implementations import Rule
from lab.sparse_work import Shape
from torch import nn
from torch.optim import Optimizer

Make = Callable[[list[nn.Parameter]], Optimizer]

TINY = Shape(50, 8, 40, "zipf", tables=2)


def torchs(rule: Rule, **changes: Any) -> Make:
    """torch's for-loop of a rule, with some of its arguments changed."""
    make = getattr(torch.optim, rule.optimizer)
    return lambda params: make(params, **{**rule.kwargs, **changes}, foreach=False)
