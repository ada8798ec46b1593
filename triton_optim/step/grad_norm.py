"""The norm of gradients: one launch a dtype, and a sum over ranks where they are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import backend
from ..launch.chunking import GradLaunchSpec
from ..launch.launcher import Launch
from ..launch.pointer_tables import on_device
from ..tensors.sharding import ReduceGroups, is_dtensor

if backend.DEVICE_TYPE:
    from ..kernels.norm import norm_kernel


class SquareSum(NamedTuple):
    """The sum of squares of the gradients of one device that are reduced alike."""

    value: Tensor  # float64 []
    reduce_groups: ReduceGroups


class GradNorm:
    """Launches that sum the squares of gradients, made once for a table of their addresses.

    Args:
        specs: what they read.
        rows: int64 [tensors, ROW_WIDTH].
        grads: int64 [tensors], addresses.
        scaled: None, or a float32 scalar: they are divided by that which `run` is given.

    Attributes:
        norm: float64 [], written by `run` where there is one sum, else by `total`.
        sums: those of squares, one for the gradients that are reduced alike.
    """

    def __init__(
        self,
        specs: Sequence[GradLaunchSpec],
        rows: Tensor,
        grads: Tensor,
        scaled: Tensor | None = None,
    ) -> None:
        device, self.rows = rows.device, rows
        self.specs = [
            spec._replace(block_to_tensor=on_device(spec.block_to_tensor, device))
            for spec in specs
            if len(spec.block_to_tensor)
        ]
        reductions = list(dict.fromkeys(spec.reduce_groups for spec in specs))
        n_partials = max((len(spec.block_to_tensor) for spec in specs), default=0)
        self._partials = torch.empty(n_partials, dtype=torch.float64, device=device)
        self._ticket = torch.zeros(1, dtype=torch.int32, device=device)
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in reductions]
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = [SquareSum(*item) for item in zip(sums, reductions, strict=True)]
        self._launches = []
        begun: set[ReduceGroups] = set()
        for spec in self.specs:
            tensors = {
                "block_to_tensor_ptr": spec.block_to_tensor,
                "tensor_table_ptr": rows,
                "grads_ptr": grads,
                "partials_ptr": self._partials,
                "arrival_count_ptr": self._ticket,
                "sum_ptr": sums[reductions.index(spec.reduce_groups)],
                "norm_ptr": self.norm,
                "grad_scale_ptr": scaled,
            }
            constants = {"ACCUMULATE": spec.reduce_groups in begun}
            self._launches.append(grad_launch(norm_kernel, spec, tensors, constants))
            begun.add(spec.reduce_groups)

    def run(self, scalars: Mapping[str, Tensor]) -> None:
        """Launch, with what a GradScaler tells."""
        scale = {name: scalars[name] for name in ("grad_scale_ptr",) if name in scalars}
        for launch in self._launches:
            launch.run(**scale)

    @property
    def tensors(self) -> list[Tensor]:
        """What the launches use and nobody else holds."""
        sums, programs = (s.value for s in self.sums), (spec.block_to_tensor for spec in self.specs)
        return [self._partials, self._ticket, self.norm, *sums, *programs]


def grad_launch(
    kernel: object,
    spec: GradLaunchSpec,
    tensors: Mapping[str, Tensor | None],
    constants: dict[str, bool],
) -> Launch:
    """A launch of a kernel of kernels/norm.py."""
    programs = spec.block_to_tensor
    config = backend.grad_config(spec.variant.dtype, programs.device)
    arguments = {
        **tensors,
        "n_bytes": float(spec.n_bytes),
        "blocks": spec.blocks,
        "DTYPE": backend.triton_dtype(spec.variant.dtype),
        "ALIGNED": spec.variant.aligned,
        **constants,
        "BLOCK_SIZE": config.block_size,
    }
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True} if backend.COMPILED else {}
    return Launch(kernel, spec.variant, len(programs), arguments, options, programs.device)


def square_sums(grads: Iterable[Tensor], scale: Tensor | None) -> list[SquareSum]:
    """By torch's operations, of gradients divided by `scale`; of DTensors over all ranks already.

    Ranks call it together where there are DTensors.
    """
    sums: dict[torch.device, Tensor] = {}
    for grad in grads:
        if scale is not None:
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale.to(grad.device)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        norm: Any = torch.linalg.vector_norm(grad, dtype=dtype)
        square = (norm.full_tensor() if is_dtensor(norm) else norm).double().square()
        sums[square.device] = sums[square.device] + square if square.device in sums else square
    return [SquareSum(value, ()) for value in sums.values()]


def total(norms: Sequence[GradNorm], others: Sequence[SquareSum]) -> Tensor:
    """The norm of everything, over all ranks: float64 []; every `norms[i].norm` gets it.

    Ranks call it together, with sums that are reduced alike in the same order. Waits for nothing.
    """
    sums = [*chain.from_iterable(norm.sums for norm in norms), *others]
    if len(sums) == 1 and norms and not sums[0].reduce_groups:
        return norms[0].norm
    home = sums[0].value.device if sums else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=home)
    for value, reduce_groups in sums:
        for mesh, dim in reduce_groups:
            value = value.clone()
            torch.distributed.all_reduce(value, group=mesh.get_group(dim))
        total = total + value.to(home, non_blocking=True)
    total.sqrt_()
    for norm in norms:
        norm.norm.copy_(total, non_blocking=True)
    return total
