"""Averaged stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules, scalar_state
from ..optimizer import FusedOptimizer
from ..options import BaseOptions
from ..rule import Rule, StateTensor
from ..scalar_state import Numbers, Rounding, ScalarState


def _advance(
    step: float, values: Numbers, hyper: Sequence[float | Tensor], rounded: Rounding
) -> tuple[Numbers, Numbers]:
    lr, lambd, alpha, t0 = map(float, hyper[:4])
    new = lr / (1 + lambd * lr * (step + 1)) ** alpha, 1 / max(1, step + 1 - t0)
    return values, tuple(torch.tensor(new, device="cpu").tolist())  # torch's, of the default dtype


RULE = Rule(
    rules.asgd_rule,
    state=(StateTensor("ax", is_exact=True),),
    hyperparameters={"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0.0},
    flags={"MAXIMIZE": lambda group: group["maximize"]},
    scalars=ScalarState(
        {"eta": lambda group: group["lr"], "mu": lambda group: 1.0},
        2,
        _advance,
        scalar_state.asgd_scalars,
    ),
    doubles=True,
)


class ASGD(FusedOptimizer, torch.optim.ASGD):
    r"""Averaged SGD in one launch; drop-in for `torch.optim.ASGD`, with `fused` added.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda_2\,\theta \\
        \theta &\leftarrow \theta - \eta_t\,(\lambda\,\theta + g), \quad
            \bar\theta \leftarrow \bar\theta + \mu_t\,(\theta - \bar\theta) \\
        \eta_{t+1} &\leftarrow \gamma / (1 + \lambda\,\gamma\,t)^\alpha, \quad
            \mu_{t+1} \leftarrow 1 / \max(1, t - t_0)

    The state `ax` is :math:`\bar\theta`; `eta` and `mu` are of the next update, and start from
    :math:`\gamma` and 1. A new learning rate counts from the update after the next, as in torch.

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor. One on a GPU is waited
            for, as in torch, where the step is not counted there.
        lambd: decay :math:`\lambda`.
        alpha: power :math:`\alpha`.
        t0: :math:`t_0`, the update from which on parameters are averaged.
        weight_decay: :math:`\lambda_2`, L2 penalty; a float or a one-element tensor.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative learning rate or weight decay.

    Example:
        >>> optimizer = ASGD(model.parameters(), lr=1e-2, t0=1000)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable,
            capturable, fused=fused, **options,
        )  # fmt: skip
