"""RMSprop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import DecayOptions, Group
from ..rule import RowWise, Rule, Scalars, StateTensor
from .lazy_rows import LAZY_ROWS, check_lazy_group


def _hyperparameters(group: Group) -> Scalars:
    lr, alpha, eps = group["lr"], group["alpha"], group["eps"]
    return lr, alpha, 1 - alpha, eps, group["weight_decay"], group["momentum"]


RULE = Rule(
    rules.rmsprop_rule,
    state=(
        StateTensor("square_avg", is_denominator=True),
        StateTensor("momentum_buffer", when=lambda group: group["momentum"] > 0),
        StateTensor("grad_avg", when=lambda group: group["centered"], is_exact=True),
    ),
    hyperparameters=_hyperparameters,
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "CENTERED": lambda group: group["centered"],
        "MOMENTUM": lambda group: group["momentum"] > 0,
    },
    doubles=True,
    row_wise=RowWise(lambda *_: "its gradient is sparse, without sparse='lazy'"),
)
LAZY_RULE = replace(RULE, row_wise=LAZY_ROWS, check_group=check_lazy_group)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop in one launch; drop-in for `torch.optim.RMSprop`, with `fused` added.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        v &\leftarrow \alpha\,v + (1 - \alpha)\,g^2 \\
        u &\leftarrow g / (\sqrt{v} + \epsilon), \text{ or centered }
            g / (\sqrt{v - m^2} + \epsilon), \; m \leftarrow \alpha\,m + (1 - \alpha)\,g \\
        \theta &\leftarrow \theta - \gamma\,u, \text{ or with momentum }
            \theta - \gamma\,b, \; b \leftarrow \mu\,b + u

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        alpha: smoothing :math:`\alpha`.
        eps: :math:`\epsilon`, outside the root.
        weight_decay: L2 penalty :math:`\lambda`.
        momentum: :math:`\mu`.
        centered: divide by the standard deviation instead of the root mean square.
        maximize: ascend.
        decoupled_weight_decay: subtract :math:`\gamma\lambda\theta` from the parameter instead of
            adding to the gradient: RMSpropW. For the whole optimizer, and in no state dict.
        foreach, differentiable, fused, capturable, options: see `FusedOptimizer`.
        sparse: "lazy" takes sparse gradients, at the cost of the rows that they touch. Without
            momentum and decay a gradient of zero moves no parameter, so that the :math:`k` steps
            which a row was left out are made good when it is touched again:
            :math:`v \leftarrow \alpha^k v`, :math:`m \leftarrow \alpha^k m`. Parameters and, in
            `state_dict()`, averages equal those of dense gradients, but for rounding: in 16 bits a
            dense average may not decay at all. State has `last_step` besides, int32, one a row,
            which state dicts leave out. None refuses sparse gradients, as torch.

    Raises:
        ValueError: a negative argument, or what `sparse="lazy"` excludes.

    Example:
        >>> optimizer = RMSprop(model.parameters(), lr=1e-3, alpha=0.9)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Tieleman and Hinton, "Lecture 6.5 - rmsprop", 2012; centered: Graves, "Generating
    sequences with recurrent neural networks", 2013.
    """

    rule = RULE
    _without_options = frozenset()

    def _current_rule(self) -> Rule:
        options = self._stepper.options
        rule = RULE if options.sparse is None else LAZY_RULE
        return rule.decoupled if options.decoupled_weight_decay else rule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        sparse: str | None = None,
        **options: Unpack[DecayOptions],
    ) -> None:
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize,
            differentiable, fused=fused, sparse=sparse, **options,
        )  # fmt: skip
