"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import CommonDecayOptions, Group, Options
from ..rule import RowWise, Rule, StateTensor


def _rows_unsupported(group: Group, options: Options) -> str | None:
    return "its gradient is sparse, with weight decay" if group["weight_decay"] != 0 else None


RULE = Rule(
    rules.adagrad_rule,
    state=(
        StateTensor("sum", lambda group: group["initial_accumulator_value"], is_denominator=True),
    ),
    hyperparameters=lambda g: (g["lr"], g["lr_decay"], g["eps"], g["weight_decay"]),
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "LR_DECAY": lambda group: group["lr_decay"] != 0,
    },
    reads_step=frozenset({"LR_DECAY"}),
    doubles=True,
    row_wise=RowWise(_rows_unsupported),
    eager_state=True,
)


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad in one launch; drop-in for `torch.optim.Adagrad`.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta
            - \frac{\gamma}{1 + (t - 1)\,\eta} \cdot \frac{g}{\sqrt{s} + \epsilon}

    Its state is made at once, as torch's, and follows a parameter that moves to another device.

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        lr_decay: :math:`\eta`.
        weight_decay: L2 penalty :math:`\lambda`.
        initial_accumulator_value: what :math:`s` starts from.
        eps: :math:`\epsilon`, outside the root.
        maximize: ascend.
        decoupled_weight_decay: subtract :math:`\gamma\lambda\theta` from the parameter instead of
            adding to the gradient, at the rate of the step. For the whole optimizer, and in no
            state dict.
        foreach, differentiable, fused, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument.

    Example:
        >>> optimizer = Adagrad(model.parameters(), lr=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and
    stochastic optimization", 2011.
    """

    rule = RULE
    _without_options = frozenset({"sparse"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[CommonDecayOptions],
    ) -> None:
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach,
            maximize=maximize, differentiable=differentiable, fused=fused, **options,
        )  # fmt: skip
