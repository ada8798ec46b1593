"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedStep
from ..step.routing import Group, State


class Adagrad(FusedStep, torch.optim.Adagrad):
    r"""Adagrad in one launch; drop-in for `torch.optim.Adagrad`.

    .. math::
        g &\leftarrow \nabla f(\theta) + \lambda\,\theta \\
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta
            - \frac{\gamma}{1 + (t - 1)\,\eta} \cdot \frac{g}{\sqrt{s} + \epsilon}

    Its state is made at once, as torch's, and follows a parameter that moves to another device.

    Args:
        params: tensors, dicts of groups or `named_parameters()`; any shape, float32, bfloat16,
            float16, float64, complex64 or complex128.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        lr_decay: :math:`\eta`.
        weight_decay: L2 penalty :math:`\lambda`.
        initial_accumulator_value: what :math:`s` starts from.
        eps: :math:`\epsilon`, outside the root.
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

    Raises:
        ValueError: a negative argument.
        RuntimeError: `fused` with `foreach` or with `differentiable`.

    Example:
        >>> optimizer = Adagrad(model.parameters(), lr=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and
    stochastic optimization", 2011.
    """

    _rule = "adagrad_rule"
    _step_flags = frozenset({"LR_DECAY"})
    _state_follows_parameter = True

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
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            options=options,
        )

    def _torch_step(self, rest: set[int]) -> None:
        for group in self.param_groups:  # torch before 2.12 makes state in its constructor alone
            for param in group["params"]:
                if id(param) in rest and param.grad is not None and not self.state.get(param):
                    self.state[param] = self._new_state(param, group)
        super()._torch_step(rest)

    def _flags(self, group: Group) -> frozenset[str]:
        flags = {"MAXIMIZE": group["maximize"], "LR_DECAY": group["lr_decay"] != 0}
        return frozenset(flag for flag, on in flags.items() if on)

    def _hyperparameters(self, group: Group) -> tuple[float | Tensor, ...]:
        return group["lr"], group["lr_decay"], group["eps"], group["weight_decay"]

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("sum",)

    def _row_refusal(self, group: Group) -> str | None:
        return "its gradient is sparse, with weight decay" if group["weight_decay"] != 0 else None

    def _new_state(self, param: Tensor, group: Group) -> State:
        value = self.defaults["initial_accumulator_value"]
        value = complex(value, value) if param.is_complex() else value
        return {"step": self._new_step(param, group), "sum": torch.full_like(param, value)}
