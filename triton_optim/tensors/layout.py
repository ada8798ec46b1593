"""Where a tensor's elements lie in memory, and whether that is still so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a private name: what replaces it below is public and slower
    TensorGuards = None  # type: ignore[assignment, misc]


def is_non_overlapping_and_dense(tensor: Tensor) -> bool:
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


def same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lay their elements out in the same order."""
    return strides_agree(a.shape, a.stride(), b.stride())


def strides_agree(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether elements lie in the same order under these strides."""
    return a == b or all(n < 2 or s == t for n, s, t in zip(shape, a, b, strict=True))


def is_contiguous_resolved(tensor: Tensor) -> bool:
    """Whether memory holds the elements one after another, as they are."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


class Layout(NamedTuple):
    """How a strided tensor lies in memory, and what it is besides."""

    type: type[Tensor]
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    is_inference: bool
    is_lazy: bool  # its conjugate or negative is meant

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(
            type(tensor),
            tensor.dtype,
            tensor.device,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.requires_grad,
            tensor.is_inference(),
            tensor.is_conj() or tensor.is_neg(),
        )


class LayoutGuard:
    """Tells whether tensors have remembered layouts, about 0.1 us each; keeps none of them."""

    def __init__(self, layouts: Sequence[Layout], rows: Sequence[Sequence[int]] = ()) -> None:
        self._layouts, self._rows = layouts, rows
        self._check = _checking(layouts)
        self._row_checks: list[tuple[Callable[[Sequence[Any]], Any], Callable[..., bool]]] = []

    def check(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether all `tensors` are there and have the remembered layouts."""
        return self._check(*tensors)

    def check_rows(self, tensors: Sequence[Tensor | None], present: Sequence[int]) -> bool:
        """Whether those have them whose row is present."""
        if not self._row_checks:
            rows = [tuple(self._layouts[i] for i in row) for row in self._rows]
            checks = {row: _checking(row) for row in {*rows}}  # many look alike
            pickers = map(picker, self._rows)
            self._row_checks = [(p, checks[row]) for p, row in zip(pickers, rows, strict=True)]
        return all(check(*pick(tensors)) for pick, check in compress(self._row_checks, present))


def picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks the items with these indices, as a sequence, at C's speed."""
    start = indices[0] if indices else 0
    stop = start + len(indices)
    if [*indices] == [*range(start, stop)]:
        return itemgetter(slice(start, stop))
    return itemgetter(*indices)


def _checking(layouts: Sequence[Layout]) -> Callable[..., bool]:
    if TensorGuards is None or any(layout.is_lazy for layout in layouts):
        return lambda *tensors: [*map(_layout, tensors)] == [*layouts]
    kinds = [(layout.type, layout.dtype, layout.device, *layout[5:7]) for layout in layouts]
    exemplars = {kind: _exemplar(*kind) for kind in {*kinds}}
    check: Callable[..., bool] = TensorGuards(
        *map(exemplars.__getitem__, kinds),
        dynamic_dims_sizes=[[*layout.shape] for layout in layouts],  # type: ignore[misc]
        dynamic_dims_strides=[[*layout.stride] for layout in layouts],  # type: ignore[misc]
    ).check
    return check


def _exemplar(
    type: type[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    requires_grad: bool,
    is_inference: bool,
) -> Tensor:
    """A tensor without elements, of which a guard takes all but shape and strides."""
    with _disable_current_modes(), torch.inference_mode(is_inference):
        tensor = torch.empty(0, dtype=dtype, device=device)
        if type is not Tensor:
            return torch.nn.Parameter(tensor, requires_grad)
        return tensor if is_inference else tensor.requires_grad_(requires_grad)


def _layout(tensor: Tensor | None) -> Layout | None:
    return Layout.of(tensor) if tensor is not None and tensor.layout == torch.strided else None
