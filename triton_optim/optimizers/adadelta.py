"""Adadelta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import BaseOptions, Group
from ..rule import Rule, Scalars, StateTensor


def _hyperparameters(group: Group) -> Scalars:
    rho = group["rho"]
    return group["lr"], rho, 1 - rho, group["eps"], group["weight_decay"]


RULE = Rule(
    rules.adadelta_rule,
    state=(
        StateTensor("square_avg", is_denominator=True),
        StateTensor("acc_delta", is_denominator=True),
    ),
    hyperparameters=_hyperparameters,
    flags={"MAXIMIZE": lambda group: group["maximize"]},
    doubles=True,
)


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    r"""Adadelta in one launch; drop-in for `torch.optim.Adadelta`, with `fused` added.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        v &\leftarrow \rho\,v + (1 - \rho)\,g^2 \\
        d &\leftarrow \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}}\,g, \quad
            u \leftarrow \rho\,u + (1 - \rho)\,d^2 \\
        \theta &\leftarrow \theta - \gamma\,d

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        rho: decay rate :math:`\rho` of both averages.
        eps: :math:`\epsilon`, inside the roots.
        weight_decay: L2 penalty :math:`\lambda`; a float or a one-element tensor.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument, or a rho outside [0, 1].

    Example:
        >>> optimizer = Adadelta(model.parameters(), rho=0.95)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Zeiler, "ADADELTA: an adaptive learning rate method", 2012.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, rho, eps, weight_decay, foreach, capturable=capturable, maximize=maximize,
            differentiable=differentiable, fused=fused, **options,
        )  # fmt: skip
