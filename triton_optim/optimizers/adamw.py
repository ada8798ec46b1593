"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import BaseOptions
from .adam import RULE


class AdamW(FusedOptimizer, torch.optim.AdamW):
    r"""AdamW in one launch; drop-in for `torch.optim.AdamW`.

    `Adam` with `decoupled_weight_decay=True`, whose arguments and errors are these. The decay is
    subtracted together with the update:

    .. math::
        \theta \leftarrow \theta - \Big(\gamma\lambda\,\theta + \gamma\,\frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon}\Big)

    torch multiplies by :math:`1 - \gamma\lambda`, which float32 rounds alike in every step.

    Example:
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, **options,
        )  # fmt: skip
