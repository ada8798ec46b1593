"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..step.routing import Group, State
from .lazy_rows import LazyRows


class RMSprop(LazyRows, torch.optim.RMSprop):
    r"""RMSprop in one launch; drop-in for `torch.optim.RMSprop`, with `fused` added.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        v &\leftarrow \alpha\,v + (1 - \alpha)\,g^2 \\
        u &\leftarrow g / (\sqrt{v} + \epsilon), \text{ or centered }
            g / (\sqrt{v - m^2} + \epsilon), \; m \leftarrow \alpha\,m + (1 - \alpha)\,g \\
        \theta &\leftarrow \theta - \gamma\,u, \text{ or with momentum }
            \theta - \gamma\,b, \; b \leftarrow \mu\,b + u

    Args:
        params: tensors, dicts of groups or `named_parameters()`; any shape, float32, bfloat16,
            float16, float64, complex64 or complex128.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        alpha: smoothing :math:`\alpha`.
        eps: :math:`\epsilon`, outside the root.
        weight_decay: L2 penalty :math:`\lambda`.
        momentum: :math:`\mu`.
        centered: divide by the standard deviation instead of the root mean square.
        foreach: True takes torch's implementation.
        maximize: ascend.
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
        sparse: "lazy" takes sparse gradients, at the cost of the rows that they touch. Without
            momentum and decay a gradient of zero moves no parameter, so that the :math:`k` steps
            which a row was left out are made good when it is touched again:
            :math:`v \leftarrow \alpha^k v`, :math:`m \leftarrow \alpha^k m`. Parameters and, in
            `state_dict()`, averages equal those of dense gradients, but for rounding: in 16 bits a
            dense average may not decay at all. State has `last_step` besides, int32, one a row,
            which state dicts leave out. None refuses sparse gradients, as torch.

    Raises:
        ValueError: a negative argument, or what `sparse="lazy"` excludes.
        RuntimeError: `fused` with `foreach` or with `differentiable`.

    Example:
        >>> optimizer = RMSprop(model.parameters(), lr=1e-3, alpha=0.9)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Tieleman and Hinton, "Lecture 6.5 - rmsprop", 2012; centered: Graves, "Generating
    sequences with recurrent neural networks", 2013.
    """

    _rule = "rmsprop_rule"
    _row_rule = "lazy_rmsprop_rule"

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
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        skip_nonfinite: bool = False,
        sparse: str | None = None,
    ) -> None:
        options = {
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "error_if_nonfinite": error_if_nonfinite,
            "skip_nonfinite": skip_nonfinite,
            "sparse": sparse,
        }
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
            options=options,
        )
        if fused:
            if differentiable:
                raise RuntimeError("`fused` does not support `differentiable`")
            if foreach:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def _flags(self, group: Group) -> frozenset[str]:
        flags = {
            "MAXIMIZE": group["maximize"],
            "CENTERED": group["centered"],
            "MOMENTUM": group["momentum"] > 0,
        }
        return frozenset(flag for flag, on in flags.items() if on)

    def _hyperparameters(self, group: Group) -> tuple[float | Tensor, ...]:
        lr, alpha, eps = group["lr"], group["alpha"], group["eps"]
        return lr, alpha, 1 - alpha, eps, group["weight_decay"], group["momentum"]

    def _state_names(self, group: Group) -> tuple[str, ...]:
        centered = ("grad_avg",) if group["centered"] else ()
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return ("square_avg", *centered, *momentum)

    def _new_state(self, param: Tensor, group: Group) -> State:
        state = {"step": self._new_step(param, group), "square_avg": torch.zeros_like(param)}
        if group["momentum"] > 0:
            state["momentum_buffer"] = torch.zeros_like(param)
        if group["centered"]:
            state["grad_avg"] = torch.zeros_like(param)
        return state
