"""Row-wise Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..launch.backend import rules
from ..optimizer import FusedOptimizer
from ..options import Group, Options
from ..rule import RowWise, Rule, State
from ..tensors.sharding import is_dtensor
from .rowwise_fallback import rowwise_adagrad_reference


def _dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _check_fallback(grad: Tensor, state: State, where: str, reason: str) -> None:
    if grad.layout != torch.strided and not (grad.is_sparse and grad.sparse_dim() == 1):
        raise RuntimeError(
            f"the gradient of {where} is {grad.layout}; RowwiseAdagrad takes dense ones and "
            "torch.sparse_coo ones with one sparse dim: make it dense with to_dense()"
        )
    if is_dtensor(grad):
        raise RuntimeError(f"{where} is a DTensor, whose rows lie on several ranks; use Adagrad")


def _check_group(group: Group, options: Options) -> None:
    for position, param in enumerate(group["params"]):
        if param.is_complex():
            raise ValueError(
                f"parameter {position} of the group is {param.dtype}; row-wise Adagrad takes real "
                "ones: give it torch.view_as_real() of it"
            )


RULE = Rule(
    rules.rowwise_adagrad_rule,
    hyperparameters=lambda group: (group["lr"], group["weight_decay"], group["eps"]),
    flags={
        "MAXIMIZE": lambda group: group["maximize"],
        "DECOUPLED": lambda group: group["decoupled_weight_decay"],
    },
    doubles=True,
    row_wise=RowWise(
        state="sum",
        dtype=_dtype,
        initial=lambda group: group["initial_accumulator_value"],
        always=True,
        check_fallback=_check_fallback,
    ),
    check_group=_check_group,
    reference=rowwise_adagrad_reference,
)


class RowwiseAdagrad(FusedOptimizer):
    r"""Adagrad with one number of state for each row of a parameter.

    .. math::
        g_i &\leftarrow \nabla f(\theta)_i + \lambda\,\theta_i \\
        s_i &\leftarrow s_i + \tfrac{1}{D} \lVert g_i \rVert^2 \\
        \theta_i &\leftarrow \theta_i - \frac{\gamma}{\sqrt{s_i} + \epsilon}\, g_i

    A row is what the first index selects: an embedding of one word, D elements. Of a tensor with
    one dim each element is a row, which is Adagrad. State takes 1 / D of Adagrad's memory.

    Gradients may be dense or, with one sparse dim, sparse as `nn.Embedding(sparse=True)` makes
    them; then only rows that have a gradient decay, and step.

    State of a parameter: `step`, and `sum`, one number a row, float32 (float64 for float64).

    Args:
        params: tensors, dicts of groups or `named_parameters()`; any shape, float32, bfloat16,
            float16 or float64. Those that are not contiguous, or with rows of more than 4,096
            elements (2,048 of float64), fall back as with `fused=False`.
        lr: learning rate :math:`\gamma`; a float or a one-element tensor.
        weight_decay: :math:`\lambda`.
        initial_accumulator_value: what :math:`s` starts from.
        eps: :math:`\epsilon`, outside the root.
        decoupled_weight_decay: shrink :math:`\theta_i` by :math:`\gamma\lambda\theta_i` instead of
            adding to the gradient.
        maximize: ascend.
        fused: see `FusedOptimizer`.

    Raises:
        ValueError: a negative argument, or a complex parameter.

    Example:
        >>> table = torch.nn.EmbeddingBag(10_000_000, 64, sparse=True, device="cuda")
        >>> optimizer = RowwiseAdagrad(table.parameters(), lr=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: FBGEMM's EXACT_ROWWISE_ADAGRAD, whose weight decays are L2 and decoupled likewise;
    Mudigere et al., "Software-hardware co-design for fast and scalable training of deep learning
    recommendation models", 2022.
    """

    rule = RULE
    _without_options = frozenset(Options.__dataclass_fields__)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, value in defaults.items():
            if not value >= 0.0:
                raise ValueError(f"Invalid {name} value: {value}; it must be 0 or more")
        flags = {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, **flags, "fused": fused})
