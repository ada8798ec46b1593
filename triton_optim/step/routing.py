"""Which way a parameter goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..launch import backend, tuning
from ..launch.row_launcher import MAX_COUNT, few_enough, rows_and_width
from ..tensors.layout import is_dense, same_order
from ..tensors.sharding import PLAIN_TYPES, is_dtensor, local, sharding_refusal

Group = dict[str, Any]
State = dict[str, Any]

# There a barrier of a program does not order what its waves store, and a row's gradients that are
# summed by several programs need that order.
RDNA = ("gfx10", "gfx11", "gfx12")

_MODE = torch._C._TorchDispatchModeKey
_TRACING = (_MODE.FAKE, _MODE.PROXY, _MODE.FUNCTIONAL)


def group_refusal(group: Group, fused: bool | None) -> str | None:
    """Why a whole parameter group goes torch's way, or None."""
    for flag in ("foreach", "differentiable"):
        if group.get(flag):
            return f"{flag}=True"
    return "fused=False" if fused is False else None


def is_traced() -> bool:
    """Whether torch traces or fakes what runs now, which it cannot do to a kernel."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)


def refusal(param: Tensor, grad: Tensor, *, by_rows: bool = False) -> str | None:
    """Why the kernels cannot update `param` from `grad`, or None if they can.

    Args:
        by_rows: whether the kernel is that of rows.
    """
    if is_traced():
        return "torch traces this step"
    if reason := sharding_refusal(param, grad):
        return reason
    if by_rows and is_dtensor(param):
        return "it is a DTensor, and updated by rows"
    param, grad = local(param), local(grad)
    if param.device.type != backend.DEVICE_TYPE:
        return f"it is on {param.device}, where the kernels do not run"
    if type(param) not in PLAIN_TYPES or type(grad) not in PLAIN_TYPES:
        return f"it is a {type(param).__name__} with a {type(grad).__name__} gradient"
    layouts = (torch.strided, torch.sparse_coo) if by_rows else (torch.strided,)
    if param.layout != torch.strided or grad.layout not in layouts:
        return f"its gradient is {grad.layout}"
    for tensor in (param, grad):
        if tensor.dtype not in backend.STORAGE_DTYPES:
            return f"{tensor.dtype} is none of {list(backend.STORAGE_DTYPES)}"
    if param.is_complex() != grad.is_complex():
        return f"it is {param.dtype} with a {grad.dtype} gradient"
    if not is_dense(param) or param.is_conj() or param.is_neg():
        return "its elements do not fill one span of memory"
    if param.is_inference() and not torch.is_inference_mode_enabled():
        return "it is an inference tensor"
    return _row_refusal(param, grad) if by_rows else None


def _row_refusal(param: Tensor, grad: Tensor) -> str | None:
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
    if rows > MAX_COUNT or (sparse and not few_enough(grad)):
        return f"it or its gradient has more than {MAX_COUNT} rows"
    return None


def moved(param: Tensor, value: Tensor) -> Tensor:
    """State on its parameter's device and in its memory order."""
    return torch.empty_like(param, dtype=value.dtype).copy_(value)


def strays(param: Tensor, state: State, names: Iterable[str]) -> list[str]:
    """Names of checked state that lies on another device, or in another order, than `param`."""
    shard = local(param)
    parts = [(name, local(state[name])) for name in names]
    return [n for n, part in parts if part.device != shard.device or not same_order(part, shard)]
