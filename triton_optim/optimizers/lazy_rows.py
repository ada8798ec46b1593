"""RMSprop on sparse gradients: rows that were left out are brought up to date when they matter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch.backend import rules
from ..options import Group, Options
from ..rule import RowWise, State

LAST_STEP = "last_step"  # int32 [rows]: the step up to which a row's averages are


def check_lazy_group(group: Group, options: Options) -> None:
    """Refuse a group of which no row could be left out."""
    if reason := _unsupported(group, options):
        raise ValueError(f"sparse='lazy' does not go with {reason}")


def _unsupported(group: Group, options: Options) -> str | None:
    """Why rows without a gradient could not be left out, or not in the kernel; or None."""
    fallback = options.unsupported(group)
    excluded = {
        "momentum, which moves every row at every step": group["momentum"] != 0,
        "weight_decay, which moves every row at every step": group["weight_decay"] != 0,
        "a tensor as alpha, which may change unseen": isinstance(group["alpha"], Tensor),
        "capturable=True: a capture would repeat the rows of its step": group["capturable"],
        f"{fallback}, which is torch's implementation": fallback is not None,
        "max_grad_norm: clip the gradients before the step": options.max_grad_norm is not None,
    }
    return next((reason for reason, is_on in excluded.items() if is_on), None)


def _check_fallback(grad: Tensor, state: State, where: str, reason: str) -> None:
    if LAST_STEP in state or grad.layout != torch.strided:
        raise RuntimeError(
            f"sparse='lazy' cannot take {where}: {reason}; use the kernels, which run on a GPU "
            "and under TRITON_INTERPRET=1, or go on from a state_dict() with dense gradients"
        )


LAZY_ROWS = RowWise(
    _unsupported,
    rules.lazy_rmsprop_rule,
    state=LAST_STEP,
    reads_step=True,
    lazy="alpha",
    check_fallback=_check_fallback,
)
