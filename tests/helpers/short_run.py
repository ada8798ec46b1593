"""A few steps of every state layout over tensors of every kind, for compute-sanitizer."""

from typing import Any

import cases
import embedding_tables
import torch
from torch import Tensor

import triton_optim


def tight(tensor: Tensor, _: int = 0) -> Tensor:
    """In memory of its own: between guard bytes an overrun would meet valid memory."""
    return tensor.clone()


SPARSE: tuple[tuple[Any, dict[str, Any]], ...] = (
    (triton_optim.SGD, {}),
    (triton_optim.Adagrad, {}),
    (triton_optim.RowwiseAdagrad, {}),
    (triton_optim.RMSprop, {"sparse": "lazy", "centered": True}),
)

vars(cases)["guarded"] = vars(embedding_tables)["guarded"] = tight
for case in cases.STATEFUL_CASES:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = cases.Tensors(dtype)
        tensors.train(case.ours(tensors.params), 2)
for dtype in (torch.float32, torch.bfloat16):
    for make, kwargs in SPARSE:
        of_tables = embedding_tables.Tables([(40, 16), (7, 5), (30,)], dtype)
        optimizer = make(of_tables.params, **kwargs)
        for hot in (3, 4000):  # a row of one program, and of many
            of_tables.new_gradients([5000, 30, 30], hot)
            optimizer.step()
torch.cuda.synchronize()
