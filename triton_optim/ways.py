"""Which way a parameter goes, and the checks that come before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import runtime
from .layout import is_dense, same_order

Group = dict[str, Any]
State = dict[str, Any]

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def group_refusal(group: Group) -> str | None:
    """Why a whole parameter group goes torch's way, or None."""
    for flag in ("foreach", "differentiable", "capturable"):
        if group.get(flag):
            return f"{flag}=True"
    return "fused=False" if group.get("fused") is False else None


def refusal(param: Tensor, grad: Tensor) -> str | None:
    """Why the kernels cannot update `param` from `grad`, or None if they can."""
    if param.device.type != runtime.DEVICE_TYPE:
        return f"it is on {param.device}, where the kernels do not run"
    if type(param) not in PLAIN_TYPES or type(grad) not in PLAIN_TYPES:
        return f"it is a {type(param).__name__} with a {type(grad).__name__} gradient"
    if param.layout != torch.strided or grad.layout != torch.strided:
        return f"its gradient is {grad.layout}"
    for tensor in (param, grad):
        if tensor.dtype not in runtime.STORAGE_DTYPES:
            return f"{tensor.dtype} is none of {list(runtime.STORAGE_DTYPES)}"
    if param.is_complex() != grad.is_complex():
        return f"it is {param.dtype} with a {grad.dtype} gradient"
    if not is_dense(param) or param.is_conj() or param.is_neg():
        return "its elements do not fill one span of memory"
    if param.is_inference() and not torch.is_inference_mode_enabled():
        return "it is an inference tensor"
    return None


def check_gradient(param: Tensor, grad: Tensor, where: str) -> None:
    """Refuse a gradient that is not its parameter's.

    Raises:
        RuntimeError: another shape or another device.
    """
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {where} is {tuple(grad.shape)} on {grad.device}, the parameter "
            f"{tuple(param.shape)} on {param.device}; clear it with zero_grad() and run backward "
            "again"
        )


def check_state(
    param: Tensor, state: State, names: Iterable[str], where: str, *, follows: bool
) -> None:
    """Refuse state that an update of `param` could not use, as a wrong checkpoint brings it.

    Args:
        param: a parameter that the kernels take.
        state: its entry of `optimizer.state`, not empty.
        names: the tensors that the rule updates, each of the parameter's shape and device.
        where: the parameter in words.
        follows: whether state on another device is moved instead of refused.

    Raises:
        RuntimeError: a tensor is missing, or of the wrong type, size, dtype, layout or device.
    """
    dtypes = set()
    for name in names:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            found = f"is {value.layout}" if isinstance(value, Tensor) else f"is {value!r}"
        elif value.shape != param.shape:
            found = f"has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}"
        elif value.dtype not in runtime.STORAGE_DTYPES or value.is_complex() != param.is_complex():
            found = f"is {value.dtype}, the parameter {param.dtype}"
        elif value.device != param.device and not follows:
            found = f"is on {value.device}, the parameter on {param.device}"
        elif type(value) not in PLAIN_TYPES or value.is_conj() or value.is_neg():
            found = f"is a {type(value).__name__} that has no memory of its own"
        else:
            dtypes.add(value.dtype)
            continue
        raise _bad_state(name, where, found)
    if len(dtypes) > 1:
        raise _bad_state(", ".join(names), where, f"mixes {sorted(map(str, dtypes))}")


def check_step(state: State, where: str) -> None:
    """Refuse a step counter that is not one real number in a tensor.

    Raises:
        RuntimeError: it is missing, or something else.
    """
    step = state.get("step")
    if not isinstance(step, Tensor) or step.numel() != 1 or step.is_complex():
        raise _bad_state("step", where, f"is {step!r}")


def strays(param: Tensor, state: State, names: Iterable[str]) -> list[str]:
    """Names of checked state that lies on another device, or in another order, than `param`."""
    return [
        name
        for name in names
        if state[name].device != param.device or not same_order(state[name], param)
    ]


def _bad_state(name: str, where: str, found: str) -> RuntimeError:
    return RuntimeError(
        f"state {name!r} of {where} {found}; load the state_dict of an optimizer over the same "
        "parameters, or delete the parameter's entry of optimizer.state to start it afresh"
    )
