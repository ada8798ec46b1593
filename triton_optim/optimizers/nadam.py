"""NAdam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules, scalar_state
from ..optimizer import FusedOptimizer
from ..options import BaseOptions, Group
from ..rule import Rule, Scalars, StateTensor
from ..scalar_state import Numbers, Rounding, ScalarState
from .betas import beta_scalars


def _hyperparameters(group: Group) -> Scalars:
    (beta1, one_minus_beta1, _), (beta2, one_minus_beta2, log2_beta2) = beta_scalars(group)
    of_the_rule = one_minus_beta1, beta2, one_minus_beta2, group["eps"], group["weight_decay"]
    return group["lr"], *of_the_rule, beta1, log2_beta2, group["momentum_decay"]


def _advance(
    step: float, values: Numbers, hyper: Sequence[float | Tensor], rounded: Rounding
) -> tuple[Numbers, Numbers]:
    beta1, beta2, momentum_decay = map(float, (hyper[6], hyper[2], hyper[8]))
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step + 1, step + 2))
    product = rounded(values[0] * rounded(mu))
    of_grad, of_avg = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    return (of_grad, of_avg, (1 - beta2 ** (step + 1)) ** -0.5), (product,)


RULE = Rule(
    rules.nadam_rule,
    state=(StateTensor("exp_avg"), StateTensor("exp_avg_sq", is_denominator=True)),
    hyperparameters=_hyperparameters,
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "DECOUPLED": lambda group: group["decoupled_weight_decay"],
    },
    scalars=ScalarState({"mu_product": lambda group: 1.0}, 3, _advance, scalar_state.nadam_scalars),
    doubles=True,
)


class NAdam(FusedOptimizer, torch.optim.NAdam):
    r"""Adam with Nesterov momentum in one launch; drop-in for `torch.optim.NAdam`.

    With Adam's averages :math:`m, v`:

    .. math::
        \mu_t &\leftarrow \beta_1 (1 - 0.96^{t \psi} / 2), \quad
            \Pi_t \leftarrow \Pi_{t-1}\,\mu_t \\
        \theta &\leftarrow \theta - \gamma\,\frac{(1 - \mu_t)\,g / (1 - \Pi_t) +
            \mu_{t+1}\,m / (1 - \Pi_t\,\mu_{t+1})}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    :math:`\Pi`, the state `mu_product`, starts from 1. `fused` is added.

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2` in [0, 1). Tensors on a GPU are waited for where the step is
            not counted there.
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`; a float or a one-element tensor.
        momentum_decay: :math:`\psi`.
        decoupled_weight_decay: subtract :math:`\gamma\lambda\theta` from the parameter instead of
            adding to the gradient; see `Adam`.
        maximize: ascend.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument, or a beta outside [0, 1).

    Example:
        >>> optimizer = NAdam(model.parameters(), lr=2e-3)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Dozat, "Incorporating Nesterov momentum into Adam", 2016.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay,
            foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, **options,
        )  # fmt: skip
