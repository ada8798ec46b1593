"""Rprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import BaseOptions, Group
from ..rule import Rule, Scalars, StateTensor


def _first_step_size(group: Group) -> float:
    lr = group["lr"]
    return float(lr.detach() if isinstance(lr, Tensor) else lr)


def _hyperparameters(group: Group) -> Scalars:
    (eta_minus, eta_plus), (smallest, largest) = group["etas"], group["step_sizes"]
    return eta_minus, eta_plus, smallest, largest


RULE = Rule(
    rules.rprop_rule,
    state=(
        StateTensor("prev"),
        StateTensor("step_size", initial=_first_step_size, is_exact=True),
    ),
    hyperparameters=_hyperparameters,
    flags={"MAXIMIZE": lambda group: group["maximize"]},
    doubles=True,
)


class Rprop(FusedOptimizer, torch.optim.Rprop):
    r"""Resilient backpropagation in one launch; drop-in for `torch.optim.Rprop`, `fused` added.

    Each element has a step size :math:`s` of its own:

    .. math::
        s &\leftarrow \text{clamp}(\eta_+ s) \text{ where } g \text{ kept its sign, }
            \text{clamp}(\eta_- s) \text{ and } g \leftarrow 0 \text{ where it changed} \\
        \theta &\leftarrow \theta - \text{sign}(g)\,s

    Signs are compared, where torch multiplies gradients, whose product may underflow.

    Args:
        params: see `FusedOptimizer`.
        lr: what :math:`s` starts from.
        etas: :math:`\eta_-` in (0, 1) and :math:`\eta_+` above 1.
        step_sizes: the least and the largest :math:`s`.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative rate, or etas outside these bounds.

    Example:
        >>> optimizer = Rprop(model.parameters(), lr=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the
    RPROP algorithm", 1993.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, etas, step_sizes, capturable=capturable, foreach=foreach,
            maximize=maximize, differentiable=differentiable, fused=fused, **options,
        )  # fmt: skip
