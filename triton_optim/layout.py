"""Where a tensor's elements lie in memory, and whether that is still so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a private name: what replaces it below is public and slower
    TensorGuards = None  # type: ignore[assignment, misc]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one span of memory, each address once, in any order of dims."""
    if tensor.is_contiguous():
        return True
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != span:
                return False
            span *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lay their elements out in the same order."""
    return a.stride() == b.stride() or all(
        size < 2 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the elements one after another, as they are."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


class LayoutGuard:
    """Remembers type, dtype, device, shape and strides of tensors.

    `check` tells whether other tensors have the same, about 0.1 us each.

    Args:
        tensors: any number of strided tensors; not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if TensorGuards is not None:
            shapes = [list(t.shape) for t in tensors]
            strides = [list(t.stride()) for t in tensors]
            self._guards = TensorGuards(
                *tensors,
                dynamic_dims_sizes=shapes,  # type: ignore[arg-type]
                dynamic_dims_strides=strides,  # type: ignore[arg-type]
            )
        else:
            self._layouts = [_layout(t) for t in tensors]

    def check(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether `tensors`, None among them or not, look as the remembered ones did."""
        if TensorGuards is not None:
            return bool(self._guards.check(*tensors))
        return [_layout(t) for t in tensors] == self._layouts


def _layout(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None or tensor.layout != torch.strided:
        return None
    conj_or_neg = (tensor.is_conj(), tensor.is_neg())
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), conj_or_neg
