"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import BaseOptions, Group
from ..rule import Rule, Scalars, StateTensor
from .betas import beta_scalars


def _hyperparameters(group: Group) -> Scalars:
    (_, one_minus_beta1, log2_beta1), (beta2, *_) = beta_scalars(group)
    return group["lr"], one_minus_beta1, log2_beta1, beta2, group["eps"], group["weight_decay"]


RULE = Rule(
    rules.adamax_rule,
    state=(StateTensor("exp_avg"), StateTensor("exp_inf", is_denominator=True)),
    hyperparameters=_hyperparameters,
    flags={"MAXIMIZE": lambda group: group["maximize"]},
    reads_step=True,
    doubles=True,
)


class Adamax(FusedOptimizer, torch.optim.Adamax):
    r"""Adamax in one launch; drop-in for `torch.optim.Adamax`, with `fused` added.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        m &\leftarrow \beta_1\,m + (1 - \beta_1)\,g, \quad
            u \leftarrow \max(\beta_2\,u, |g| + \epsilon) \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \cdot \frac{m}{u}

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: L2 penalty :math:`\lambda`; a float or a one-element tensor.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument, or a beta outside [0, 1).

    Example:
        >>> optimizer = Adamax(model.parameters(), lr=2e-3)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable, fused=fused, **options,
        )  # fmt: skip
