"""An optimizer that a user writes: Lion, a rule and a class, and its reference.

Chen et al., "Symbolic discovery of optimization algorithms", 2023.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_optim import FusedOptimizer, Rule


@triton.jit  # type: ignore[untyped-decorator]
def lion_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):  # type: ignore[no-untyped-def]
    """c = b1 m + (1 - b1) g, p -= lr (sign(c) + wd p), m = b2 m + (1 - b2) g."""
    lr, beta1, beta2, weight_decay = hyper
    (exp_avg,) = state
    update = beta1.to(grad.dtype) * exp_avg + (1 - beta1).to(grad.dtype) * grad
    sign = (update > 0).to(grad.dtype) - (update < 0).to(grad.dtype)
    param -= lr.to(param.dtype) * (sign + weight_decay.to(param.dtype) * param)
    return param, (beta2.to(grad.dtype) * exp_avg + (1 - beta2).to(grad.dtype) * grad,)


def lion_reference(
    param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    exp_avg, beta1, beta2 = state["exp_avg"], group["beta1"], group["beta2"]
    update = (beta1 * exp_avg + (1 - beta1) * grad).sign_()
    param.sub_(group["lr"] * (update + group["weight_decay"] * param))
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


class Lion(FusedOptimizer):
    rule = Rule(
        lion_rule,
        state=("exp_avg",),
        hyperparameters={"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0},
        doubles=True,
        reference=lion_reference,
    )
