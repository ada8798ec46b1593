"""Row-wise Adagrad in torch's operations: for what the kernels cannot take."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch.row_launcher import rows_and_width
from ..options import Group
from ..rule import State


def rowwise_adagrad_reference(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """One step of a parameter, in place."""
    sum = state["sum"]
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
