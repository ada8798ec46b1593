"""Stochastic gradient descent, with momentum and Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedStep
from ..step.routing import Group, State


class SGD(FusedStep, torch.optim.SGD):
    r"""Stochastic gradient descent in one launch; drop-in for `torch.optim.SGD`.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        b &\leftarrow g \text{ at the first step, then } \mu\,b + (1 - d)\,g \\
        \theta &\leftarrow \theta - \gamma\,b, \text{ or with Nesterov }
            \theta - \gamma\,(g + \mu\,b)

    Args:
        params: tensors, dicts of groups or `named_parameters()`; any shape, float32, bfloat16,
            float16, float64, complex64 or complex128.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        momentum: :math:`\mu`; 0 keeps no state.
        dampening: :math:`d`.
        weight_decay: L2 penalty :math:`\lambda`.
        nesterov: look ahead by one momentum step.
        maximize: ascend.
        foreach: True takes torch's implementation.
        differentiable: True takes torch's implementation.
        fused: True insists on the kernels, and lets a `GradScaler` leave unscaling and skipping to
            them, without waiting for the device. None decides parameter by parameter, and the
            scaler unscales and skips by itself. False takes torch's implementation.
        capturable: let a CUDA graph capture the step; see the README. Parameters must be on a GPU.
        max_grad_norm: clip the gradients of a step to this norm, all together, as
            `torch.nn.utils.clip_grad_norm_` would, without writing them. None clips nothing.
        error_if_nonfinite: raise where that norm is infinite or NaN; waits for the device.
        skip_nonfinite: leave everything as it was where that norm is infinite or NaN, and count it
            in `skipped_steps`.

    Raises:
        ValueError: a negative rate, momentum or decay, or Nesterov without momentum.
        RuntimeError: `fused` with `foreach` or with `differentiable`.

    Example:
        >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum
    in deep learning", 2013.
    """

    _rule = "sgd_rule"
    _step_flags = frozenset({"DAMPENING"})
    _counts_steps = False

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
        capturable: bool = False,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        options = {
            "capturable": capturable,
            "max_grad_norm": max_grad_norm,
            "error_if_nonfinite": error_if_nonfinite,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            options=options,
        )

    def _flags(self, group: Group) -> frozenset[str]:
        flags = {
            "MAXIMIZE": group["maximize"],
            "MOMENTUM": group["momentum"] != 0,
            "DAMPENING": group["dampening"] != 0 and group["momentum"] != 0,
            "NESTEROV": group["nesterov"] and group["momentum"] != 0,
        }
        return frozenset(flag for flag, on in flags.items() if on)

    def _hyperparameters(self, group: Group) -> tuple[float | Tensor, ...]:
        return group["lr"], group["momentum"], 1 - group["dampening"], group["weight_decay"]

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _row_refusal(self, group: Group) -> str | None:
        if group["momentum"] != 0:
            return "its gradient is sparse, with momentum"
        weight_decay = group["weight_decay"]
        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            return "its gradient is sparse, with weight decay"
        return None

    def _has_state(self, state: State) -> bool:
        return state.get("momentum_buffer") is not None

    def _new_state(self, param: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(param)}
