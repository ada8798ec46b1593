"""Stochastic gradient descent, with momentum and Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import CommonDecayOptions, Group, Options
from ..rule import RowWise, Rule, StateTensor


def _has_momentum(group: Group) -> bool:
    return bool(group["momentum"] != 0)


def _rows_unsupported(group: Group, options: Options) -> str | None:
    if _has_momentum(group):
        return "its gradient is sparse, with momentum"
    weight_decay = group["weight_decay"]
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    return "its gradient is sparse, with weight decay" if decays else None


RULE = Rule(
    rules.sgd_rule,
    state=(StateTensor("momentum_buffer", when=_has_momentum),),
    hyperparameters=lambda g: (g["lr"], g["momentum"], 1 - g["dampening"], g["weight_decay"]),
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "MOMENTUM": _has_momentum,
        "DAMPENING": lambda group: group["dampening"] != 0 and _has_momentum(group),
        "NESTEROV": lambda group: group["nesterov"] and _has_momentum(group),
    },
    counts_step=False,
    reads_step=frozenset({"DAMPENING"}),
    doubles=True,
    row_wise=RowWise(_rows_unsupported),
)


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent in one launch; drop-in for `torch.optim.SGD`.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        b &\leftarrow g \text{ at the first step, then } \mu\,b + (1 - d)\,g \\
        \theta &\leftarrow \theta - \gamma\,b, \text{ or with Nesterov }
            \theta - \gamma\,(g + \mu\,b)

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        momentum: :math:`\mu`; 0 keeps no state.
        dampening: :math:`d`.
        weight_decay: L2 penalty :math:`\lambda`.
        nesterov: look ahead by one momentum step.
        maximize: ascend.
        decoupled_weight_decay: subtract :math:`\gamma\lambda\theta` from the parameter instead of
            adding to the gradient: SGDW. For the whole optimizer, and in no state dict.
        foreach, differentiable, fused, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative rate, momentum or decay, or Nesterov without momentum.

    Example:
        >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum
    in deep learning", 2013; decoupled: Loshchilov and Hutter, "Decoupled weight decay
    regularization", 2019.
    """

    rule = RULE
    _without_options = frozenset({"sparse"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[CommonDecayOptions],
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize,
            foreach=foreach, differentiable=differentiable, fused=fused, **options,
        )  # fmt: skip
