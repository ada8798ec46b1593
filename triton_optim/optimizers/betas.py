"""Decay rates of running averages, as the kernels' rules read them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..launch import backend
from ..options import Group
from ..rule import Scalars


def beta_scalars(group: Group) -> tuple[Scalars, Scalars]:
    """`(beta, 1 - beta, log2(beta))` for both betas of a parameter group, in double precision.

    Raises:
        ValueError: there are not two, or one is not in [0, 1). A tensor on a GPU is not looked at.
    """
    betas = tuple(group["betas"])
    if len(betas) != 2:
        raise ValueError(f"betas are {betas}; give two betas")
    return _scalars(0, betas[0]), _scalars(1, betas[1])


def _scalars(index: int, beta: float | Tensor) -> Scalars:
    if isinstance(beta, Tensor) and beta.device.type in backend.CAPTURABLE_DEVICE_TYPES:
        double = beta.detach().double()
        return double, 1 - double, torch.log2(double)
    value = float(beta)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    return value, 1 - value, math.log2(value) if value else -math.inf
