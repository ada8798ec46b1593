"""torch's DTensor: the local shard that a kernel updates, and over which ranks a sum runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter

# A mesh and one of its dims, for each dim over which a tensor's elements are spread.
ReduceGroups = tuple[tuple[Any, int], ...]

PLAIN_TYPES = (Tensor, Parameter)

local_of = attrgetter("_local_tensor")
spec_of = attrgetter("_spec")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which there is none before torch's module is imported."""
    if type(tensor) in PLAIN_TYPES:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(tensor) is module.DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    shard: Tensor = local_of(tensor) if is_dtensor(tensor) else tensor
    return shard


def same_sharding(spec: Any, other: Any) -> bool:
    return spec is other or (spec.placements == other.placements and spec.mesh == other.mesh)


def redistribute_grad(param: Tensor) -> None:
    """Redistribute the gradient of a DTensor as the parameter is: it may be a partial sum.

    All ranks of the mesh call it together.
    """
    grad: Any = param.grad
    if grad is None or not is_dtensor(param) or not is_dtensor(grad):
        return
    spec = spec_of(param)
    if not same_sharding(spec, spec_of(grad)) and spec.mesh == spec_of(grad).mesh:
        param.grad = grad.redistribute(spec.mesh, spec.placements)


def sharding_unsupported(param: Tensor, grad: Tensor) -> str | None:
    """Why a gradient does not lie beside its parameter on every rank, or None."""
    if is_dtensor(param) != is_dtensor(grad):
        return f"it is a {type(param).__name__} with a {type(grad).__name__} gradient"
    if is_dtensor(param):
        spec, other = spec_of(param), spec_of(grad)
        if not same_sharding(spec, other):
            return f"it is placed as {spec.placements}, its gradient as {other.placements}"
        if any(placement.is_partial() for placement in spec.placements):
            return f"it is placed as {spec.placements}"
    return None


def reduce_groups(tensor: Tensor) -> ReduceGroups:
    """Over what a sum over a tensor's elements must be reduced: nothing, unless it is sharded."""
    if not is_dtensor(tensor):
        return ()
    spec = spec_of(tensor)
    return tuple((spec.mesh, i) for i, p in enumerate(spec.placements) if not p.is_replicate())


def device_types(tensors: Iterable[Tensor]) -> set[str]:
    """Of the meshes of those that are DTensors."""
    return {spec_of(t).mesh.device_type for t in tensors if is_dtensor(t)}


CONSECUTIVE, EIGHTS, SINGLY = range(3)  # of kernels/random_bits.py


class GlobalIndex(NamedTuple):
    """Where the elements that a rank holds lie in the whole tensor, both in memory order.

    The rank's are cut into rows of `columns`, which begin `pitch` elements after one another.
    """

    sharding: int = CONSECUTIVE
    offset: int = 0
    columns: int = 1
    pitch: int = 1


def global_index(param: Tensor, where: str) -> GlobalIndex:
    """Of a parameter, which may be a DTensor.

    Args:
        where: the parameter in words.

    Raises:
        RuntimeError: its shards lie in more than two levels of rows.
    """
    if not is_dtensor(param) or not local_of(param).numel():
        return GlobalIndex()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec, shard = spec_of(param), local_of(param)
    _, starts = compute_local_shape_and_global_offset(param.shape, spec.mesh, spec.placements)
    dims = _memory_order(param, shard)
    held, whole = [shard.shape[d] for d in dims], [param.shape[d] for d in dims]
    cut = [i for i in range(len(held)) if held[i] != whole[i]]
    last = cut[-1] if cut else 0
    if any(0 < i < last for i in cut):
        raise RuntimeError(
            f"{where} is {tuple(param.shape)} and placed as {spec.placements}: stochastic rounding "
            "takes shards of the first dim and of one more; shard it so, or leave it to an "
            "optimizer of its own"
        )
    offset = sum(starts[d] * prod(whole[i + 1 :]) for i, d in enumerate(dims))
    columns, pitch = prod(held[last:]), prod(whole[last:])
    if prod(held[:last]) == 1:
        columns = pitch = max(shard.numel(), 1)
        return GlobalIndex(SINGLY if offset % 8 else CONSECUTIVE, offset, columns, pitch)
    in_eights = not (offset % 8 or columns % 8 or pitch % 8)
    return GlobalIndex(EIGHTS if in_eights else SINGLY, offset, columns, pitch)


def _memory_order(param: Tensor, shard: Tensor) -> list[int]:
    """The dims from that of the largest stride on: as the whole tensor says, if it can be."""
    dims = sorted(range(param.ndim), key=param.stride().__getitem__, reverse=True)
    if not shard.permute(dims).is_contiguous():  # distribute_tensor makes shards contiguous
        dims = sorted(range(param.ndim), key=shard.stride().__getitem__, reverse=True)
    return dims


def dtensor_like(param: Tensor, shard: Tensor, *, rows: bool = False) -> Tensor:
    """A DTensor with this shard, placed as a DTensor is; of rows that only this rank knows."""
    from torch.distributed.tensor import DTensor, Shard

    spec = spec_of(param)
    if rows:
        placements = [Shard(0)] * len(spec.placements)
        return DTensor.from_local(shard, spec.mesh, placements, run_check=False)
    return DTensor.from_local(
        shard, spec.mesh, spec.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
