"""`clip_grad_norm_` in two launches."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from ..launch import backend, kernel_args
from ..launch.chunking import chunk_grads
from ..launch.pointer_tables import (
    addresses_of,
    as_tensor,
    column,
    is_aligned,
    on_device,
    real_numel,
)
from ..launch.variant import STORAGE_DTYPES, GradVariant
from ..options import checked_max_norm
from ..step import grad_norm
from ..step.grad_norm import GradNorm, grad_launch
from ..step.routing import tensors_unsupported
from ..tensors.sharding import local, redistribute_grad, reduce_groups

if backend.DEVICE_TYPE:
    from ..kernels.norm import scale_kernel


@_disable_dynamo
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Clip the norm of all gradients together; drop-in for `torch.nn.utils.clip_grad_norm_`.

    .. math::
        g \leftarrow g \cdot \min\left(\frac{c}{\lVert g \rVert + 10^{-6}}, 1\right)

    One launch reads the gradients and one scales them, where there is something to clip. An
    optimizer's `max_grad_norm` does without the second.

    Args:
        parameters: tensors whose gradients are clipped in place; of any shape, float32, bfloat16,
            float16, float64, complex64 or complex128.
        max_norm: :math:`c`.
        norm_type: another than 2 takes torch's implementation.
        error_if_nonfinite: raise where the norm is infinite or NaN; waits for the device.
        foreach: True and False take torch's implementation.

    Returns:
        The norm before clipping: [], on the gradients' device, of their dtype. Over all ranks where
        gradients are DTensors, and then a plain tensor, where torch's is a DTensor.

    Raises:
        TypeError: `max_norm` is no number.
        ValueError: it is negative or NaN.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is True; nothing is clipped.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
    2013.
    """
    params = [parameters] if isinstance(parameters, Tensor) else [*parameters]
    if isinstance(parameters, types.GeneratorType) and not params:
        message = "`parameters` is an empty generator, no gradient clipping will occur."
        warnings.warn(message, stacklevel=2)
    max_norm = checked_max_norm(max_norm, "max_norm")
    for param in params:
        redistribute_grad(param)
    grads = [param.grad for param in params if param.grad is not None]
    if foreach is not None or float(norm_type) != 2.0 or not _kernels_take(grads):
        arguments = (max_norm, norm_type, error_if_nonfinite, foreach)
        return torch.nn.utils.clip_grad_norm_(params, *arguments)
    return _clip(grads, max_norm, error_if_nonfinite)


def _kernels_take(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients lie apart on one device where kernels run, outside of a capture.

    A replay would read tables that are gone.
    """
    shards = [local(grad) for grad in grads]
    if len({shard.device for shard in shards}) != 1 or backend.is_capturing(shards[0].device):
        return False
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes) for s in shards if s.numel())
    apart = all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    return apart and not any(tensors_unsupported(grad, grad) for grad in grads)


def _clip(grads: list[Tensor], max_norm: float, error_if_nonfinite: bool) -> Tensor:
    shards = [local(grad) for grad in grads]
    device = shards[0].device
    addresses = addresses_of(shards)
    numels = [real_numel(shard) for shard in shards]
    variants = [
        GradVariant(STORAGE_DTYPES[shard.dtype], is_aligned([address]))
        for shard, address in zip(shards, addresses, strict=True)
    ]
    first, specs = chunk_grads(numels, variants, [reduce_groups(grad) for grad in grads], device)
    rows = [x for n, f in zip(numels, first, strict=True) for x in kernel_args.row(n, 0, 0, (), f)]
    columns = (column("q", rows), column("q", addresses), column("d", [max_norm]))
    lengths = [len(part) // 8 for part in columns]
    tables = on_device(as_tensor(b"".join(columns)), device).split(lengths)
    squares = GradNorm(specs, tables[0].view(-1, backend.ROW_WIDTH), tables[1])
    squares.run({})
    total = grad_norm.total([squares], ())
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To disable this error and scale the gradients by the non-finite "
            "norm anyway, set `error_if_nonfinite=False`"
        )
    for spec in squares.specs:
        tensors = {
            "block_to_tensor_ptr": spec.block_to_tensor,
            "tensor_table_ptr": squares.rows,
            "grads_ptr": tables[1],
            "norm_ptr": squares.norm,
            "max_norm_ptr": tables[2].view(torch.float64)[0],
        }
        grad_launch(scale_kernel, spec, tensors, {}).run()
    increment_version([*grads, *shards])
    return total.to(reduce(torch.promote_types, (shard.dtype.to_real() for shard in shards)))
