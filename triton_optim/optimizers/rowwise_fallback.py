"""Row-wise Adagrad in torch's operations: for what the kernels cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..launch.row_launcher import rows_and_width
from ..step.routing import Group, State


class RowwiseAdagradLoop(torch.optim.Optimizer):
    """See `RowwiseAdagrad`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        weight_decay: float,
        initial_accumulator_value: float,
        eps: float,
        decoupled_weight_decay: bool,
        maximize: bool,
        fused: bool | None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        numbers = {
            "lr": lr,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, value in numbers.items():
            if not value >= 0.0:
                raise ValueError(f"Invalid {name} value: {value}; it must be 0 or more")
        options = {
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, {**numbers, **options})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a parameter is complex.
        """
        super().add_param_group(param_group)
        for position, param in enumerate(self.param_groups[-1]["params"]):
            if param.is_complex():
                del self.param_groups[-1]
                raise ValueError(
                    f"parameter {position} of the group is {param.dtype}; row-wise Adagrad takes "
                    "real ones: give it torch.view_as_real() of it"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to any defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state.update(self._new_state(param, group))
                    state["step"] += 1
                    _step(param, param.grad, state["sum"], group)
        return loss

    def _new_state(self, param: Tensor, group: Group) -> State:
        raise NotImplementedError


def _step(param: Tensor, grad: Tensor, sum: Tensor, group: Group) -> None:
    n_rows, width = rows_and_width(param)
    if param.numel() == 0:
        return
    dtype = sum.dtype
    rows, sums = param.reshape(n_rows, width), sum.view(n_rows)
    if grad.layout == torch.sparse_coo:
        values = grad._values().to(dtype)
        grad = torch.sparse_coo_tensor(grad._indices(), values, grad.shape).coalesce()
        index, g = grad._indices()[0], grad._values().view(-1, width)
        p, s = _updated(rows[index].to(dtype), g, sums[index], group)
        rows.index_copy_(0, index, p.to(param.dtype))
        sums.index_copy_(0, index, s)
    else:
        p, s = _updated(rows.to(dtype), grad.reshape(n_rows, width).to(dtype), sums, group)
        rows.copy_(p)
        sums.copy_(s)
    if rows.data_ptr() != param.data_ptr():  # a copy, since rows do not lie one after another
        param.copy_(rows.view(param.shape))


def _updated(p: Tensor, g: Tensor, s: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """rowwise_adagrad_rule, over [rows, width]."""
    lr, weight_decay = group["lr"], group["weight_decay"]
    g = -g if group["maximize"] else g
    if group["decoupled_weight_decay"]:
        p, weight_decay = p * (1 - lr * weight_decay), 0
    if weight_decay != 0:
        g = g + weight_decay * p
    s = s + g.square().mean(1)
    return p - (lr / (s.sqrt() + group["eps"]))[:, None] * g, s
