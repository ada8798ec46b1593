"""Decay rates of running averages, as the kernels' rules read them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..launch import backend
from ..options import Group
from ..rule import Scalars


def beta_scalars(group: Group) -> tuple[Scalars, ...]:
    """`(beta, 1 - beta, log2(beta))` for each beta of a parameter group, in double precision.

    Raises:
        ValueError: a beta is not in [0, 1). One that is a tensor on a GPU is not looked at.
    """
    return tuple(_scalars(index, beta) for index, beta in enumerate(group["betas"]))


def _scalars(index: int, beta: float | Tensor) -> Scalars:
    if isinstance(beta, Tensor) and beta.device.type in backend.CAPTURABLE_DEVICE_TYPES:
        double = beta.detach().double()
        return double, 1 - double, torch.log2(double)
    value = float(beta)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    return value, 1 - value, math.log2(value) if value else -math.inf
