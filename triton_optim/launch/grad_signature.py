"""How a parameter's latest gradient was, for steps in which it is missing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors.layout import Layout
from .pointer_tables import is_aligned
from .row_launcher import Kind, address_of, kind_of


class GradSignature(NamedTuple):
    """A gradient's layout, and its parameter's then; shards of DTensors."""

    param: Layout | None  # None of another kind of tensor
    grad: Layout | None  # None of a sparse gradient
    is_taken: bool = False  # whether a kernel takes the parameter
    kind: Kind | None = None  # of one that is updated row by row
    is_aligned: bool = True

    @classmethod
    def of(cls, shard: Tensor, grad: Tensor, *, row_wise: bool) -> GradSignature:
        """Of a parameter that the kernels take."""
        if not row_wise:
            aligned = is_aligned([grad.data_ptr()])
            return cls(Layout.of(shard), Layout.of(grad), True, None, aligned)
        values = grad._values() if grad.layout == torch.sparse_coo else grad
        return cls(Layout.of(shard), None, True, kind_of(grad), is_aligned([address_of(values)]))
