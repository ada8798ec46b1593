"""Which parameters the kernels take, and which fall back to torch's implementation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..launch import backend, tuning
from ..launch.row_launcher import MAX_NNZ, few_enough, rows_and_width
from ..launch.variant import STORAGE_DTYPES
from ..options import Group
from ..rule import State
from ..tensors.layout import is_non_overlapping_and_dense, same_memory_order
from ..tensors.sharding import PLAIN_TYPES, is_dtensor, local, sharding_unsupported
from .view import OptimizerView

# There a barrier of a program does not order what its waves store, and a row's gradients that are
# summed by several programs need that order.
RDNA = ("gfx10", "gfx11", "gfx12")

_MODE = torch._C._TorchDispatchModeKey
_TRACING = (_MODE.FAKE, _MODE.PROXY, _MODE.FUNCTIONAL)


def is_traced() -> bool:
    """Whether torch traces or fakes what runs now, which it cannot do to a kernel."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)


def unsupported(view: OptimizerView, param: Tensor, grad: Tensor, group: Group) -> str | None:
    """Why a parameter falls back to torch's implementation, or None."""
    if reason := view.options.unsupported(group):
        return reason
    row_wise = view.rule.is_row_wise(grad, view.state.get(param, {}))
    if row_wise and (reason := view.rule.rows_unsupported(group, view.options)):
        return reason
    return tensors_unsupported(param, grad, row_wise=row_wise)


def tensors_unsupported(param: Tensor, grad: Tensor, *, row_wise: bool = False) -> str | None:
    """Why the kernels cannot update `param` from `grad`, or None if they can.

    Args:
        row_wise: whether rows are updated one by one.
    """
    if is_traced():
        return "torch traces this step"
    if reason := sharding_unsupported(param, grad):
        return reason
    if row_wise and is_dtensor(param):
        return "it is a DTensor, and updated by rows"
    param, grad = local(param), local(grad)
    if param.device.type != backend.DEVICE_TYPE:
        return f"it is on {param.device}, where the kernels do not run"
    if type(param) not in PLAIN_TYPES or type(grad) not in PLAIN_TYPES:
        return f"it is a {type(param).__name__} with a {type(grad).__name__} gradient"
    layouts = (torch.strided, torch.sparse_coo) if row_wise else (torch.strided,)
    if param.layout != torch.strided or grad.layout not in layouts:
        return f"its gradient is {grad.layout}"
    for tensor in (param, grad):
        if tensor.dtype not in STORAGE_DTYPES:
            return f"{tensor.dtype} is none of {list(STORAGE_DTYPES)}"
    if param.is_complex() != grad.is_complex():
        return f"it is {param.dtype} with a {grad.dtype} gradient"
    if not is_non_overlapping_and_dense(param) or param.is_conj() or param.is_neg():
        return "its elements do not fill one span of memory"
    if param.is_inference() and not torch.is_inference_mode_enabled():
        return "it is an inference tensor"
    return _rows_unsupported(param, grad) if row_wise else None


def _rows_unsupported(param: Tensor, grad: Tensor) -> str | None:
    if param.is_complex() or grad.is_complex():
        return f"it is {param.dtype}, and updated by rows"
    rows, width = rows_and_width(param)
    if not param.is_contiguous():
        return "its rows do not follow one another in memory"
    most = tuning.MAX_ROW_BYTES // (8 if param.dtype == torch.float64 else 4)
    if width > most:
        return f"its rows have {width} elements, more than {most}"
    sparse = grad.layout == torch.sparse_coo
    if sparse and backend.COMPILED and backend.architecture(param.device).startswith(RDNA):
        return f"its gradient is sparse, on {backend.architecture(param.device)}"
    if sparse and grad.sparse_dim() != 1:
        return f"its gradient has {grad.sparse_dim()} sparse dims"
    if rows > MAX_NNZ or (sparse and not few_enough(grad)):
        return f"it or its gradient has more than {MAX_NNZ} rows"
    return None


def laid_out_like(param: Tensor, value: Tensor) -> Tensor:
    """State on its parameter's device and in its memory order."""
    return torch.empty_like(param, dtype=value.dtype).copy_(value)


def misplaced(param: Tensor, state: State, names: Iterable[str]) -> list[str]:
    """Names of checked state that lies on another device, or in another order, than `param`."""
    shard = local(param)
    parts = [(name, local(state[name])) for name in names]
    return [
        n for n, part in parts if part.device != shard.device or not same_memory_order(part, shard)
    ]
