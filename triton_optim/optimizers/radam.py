"""RAdam."""

from __future__ import annotations

import math

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
    (_, one_minus_beta1, log2_beta1), second = beta_scalars(group)
    _, one_minus_beta2, log2_beta2 = second
    rest = 2 / one_minus_beta2 - 1 + 2 / (math.log(2) * log2_beta2)
    first = group["lr"], one_minus_beta1, log2_beta1
    return *first, *second, rest, group["eps"], group["weight_decay"]


RULE = Rule(
    rules.radam_rule,
    state=(StateTensor("exp_avg"), StateTensor("exp_avg_sq", is_denominator=True)),
    hyperparameters=_hyperparameters,
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "DECOUPLED": lambda group: group["decoupled_weight_decay"],
    },
    reads_step=True,
    doubles=True,
)


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""Rectified Adam in one launch; drop-in for `torch.optim.RAdam`, with `fused` added.

    With Adam's averages :math:`m, v`, and :math:`\rho_t` the length of the average :math:`v`:

    .. math::
        \rho &\leftarrow 2 / (1 - \beta_2) - 1, \quad
            \rho_t \leftarrow \rho - 2 t \beta_2^t / (1 - \beta_2^t) \\
        r &\leftarrow \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho}{(\rho - 4)(\rho - 2)\rho_t}} \\
        \theta &\leftarrow \theta - \frac{\gamma\,m}{1 - \beta_1^t} \cdot
            \frac{r \sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon}, \text{ without the last factor }
            \text{while } \rho_t \le 5

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`; a float or a one-element tensor.
        decoupled_weight_decay: subtract :math:`\gamma\lambda\theta` from the parameter instead of
            adding to the gradient; see `Adam`.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument, or a beta outside [0, 1).

    Example:
        >>> optimizer = RAdam(model.parameters(), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond", 2020.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            **options,
        )  # fmt: skip
