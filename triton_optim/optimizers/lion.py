"""Lion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import CommonOptions, Group
from ..rule import RowWise, Rule, Scalars, State, StateTensor
from .betas import beta_scalars

_ALWAYS_DECOUPLED = "Lion's weight decay is always decoupled; leave decoupled_weight_decay out"


def _hyperparameters(group: Group) -> Scalars:
    (_, one_minus_beta1, _), (_, one_minus_beta2, _) = beta_scalars(group)
    return group["lr"], one_minus_beta1, one_minus_beta2, group["weight_decay"]


def lion_reference(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """One step of a parameter in torch's operations, in place."""
    exp_avg, (beta1, beta2) = state["exp_avg"], map(float, group["betas"])
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if param.is_complex():
        param, grad, exp_avg = map(torch.view_as_real, (param, grad, exp_avg))
    grad = -grad if group["maximize"] else grad
    update = exp_avg.lerp(grad, 1 - beta1).sign_()
    param.sub_(lr * (update + weight_decay * param))
    exp_avg.lerp_(grad, 1 - beta2)


def _check_fallback(grad: Tensor, state: State, where: str, reason: str) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"Lion does not support sparse gradients, as that of {where}; make it dense with "
            "to_dense()"
        )


RULE = Rule(
    rules.lion_rule,
    state=(StateTensor("exp_avg"),),
    hyperparameters=_hyperparameters,
    flags={"MAXIMIZE": lambda group: group["maximize"]},
    doubles=True,
    row_wise=RowWise(lambda *_: "its gradient is sparse", check_fallback=_check_fallback),
    reference=lion_reference,
)


class Lion(FusedOptimizer):
    r"""Lion: evolved sign momentum, in one launch. torch has no such class.

    .. math::
        \theta &\leftarrow \theta
            - \gamma\,(\text{sign}(\beta_1\,m + (1 - \beta_1)\,g) + \lambda\,\theta) \\
        m &\leftarrow \beta_2\,m + (1 - \beta_2)\,g

    State of a parameter: `step` and `exp_avg`. A NaN has the sign 0, as in torch.

    Args:
        params: see `FusedOptimizer`.
        lr: learning rate :math:`\gamma`, 3 to 10 times smaller than AdamW's; a float or a
            one-element tensor.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        weight_decay: decoupled, :math:`\lambda`; a float or a one-element tensor.
        maximize: ascend.
        fused: False takes torch's operations; see `FusedOptimizer`.
        options: see `FusedOptimizer`.

    Raises:
        TypeError: `decoupled_weight_decay`, which Lion always has.
        ValueError: a negative argument, one of several elements, or a beta outside [0, 1).

    Example:
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Chen et al., "Symbolic discovery of optimization algorithms", 2023.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        if "decoupled_weight_decay" in options:
            raise TypeError(_ALWAYS_DECOUPLED)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"{name} has {value.numel()} elements; give it a number, or a tensor of one "
                    "element"
                )
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, fused=fused, **options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; see `FusedOptimizer.add_param_group`."""
        if "decoupled_weight_decay" in param_group:
            raise ValueError(_ALWAYS_DECOUPLED)
        super().add_param_group(param_group)
