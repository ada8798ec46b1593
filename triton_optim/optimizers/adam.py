"""Adam."""

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
    (_, one_minus_beta1, log2_beta1), second = beta_scalars(group)
    return group["lr"], one_minus_beta1, log2_beta1, *second, group["eps"], group["weight_decay"]


RULE = Rule(
    rules.adam_rule,
    state=(
        StateTensor("exp_avg"),
        StateTensor("exp_avg_sq", is_denominator=True),
        # The maximum of numbers that are rounded at random grows beyond that of the numbers.
        StateTensor(
            "max_exp_avg_sq", when=lambda g: g["amsgrad"], is_denominator=True, is_exact=True
        ),
    ),
    hyperparameters=_hyperparameters,
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "AMSGRAD": lambda group: group["amsgrad"],
        "DECOUPLED": lambda group: group["decoupled_weight_decay"],
    },
    reads_step=True,
    doubles=True,
)


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam in one launch; drop-in for `torch.optim.Adam`.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        m &\leftarrow \beta_1\,m + (1 - \beta_1)\,g, \quad
            v \leftarrow \beta_2\,v + (1 - \beta_2)\,g^2 \\
        \theta &\leftarrow \theta - \gamma\,\frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    :math:`t` counts the updates of each parameter; a skipped step is none.

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2` in [0, 1); two floats or two one-element tensors. On a GPU
            tensors are read there, and complements and powers are taken in float64.
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`; a float or a one-element tensor.
        amsgrad: divide by the root of the largest :math:`v` until now.
        decoupled_weight_decay: subtract :math:`\gamma\lambda\theta` from the parameter instead of
            adding to the gradient; without the rounding of :math:`1 - \gamma\lambda`.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument, or a beta outside [0, 1).

    Example:
        >>> optimizer = Adam(model.parameters(), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015; AMSGrad: Reddi, Kale
    and Kumar, "On the convergence of Adam and beyond", 2018.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay, **options,
        )  # fmt: skip
