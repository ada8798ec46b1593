"""The float32 weights of a model whose bfloat16 parameters have remainders in an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..optimizer import FusedOptimizer
from ..options import Group
from ..step.state import new_state
from ..step.view import OptimizerView
from ..storage import REMAINDER
from ..tensors.sharding import dtensor_like, is_dtensor, local, local_of

Optimizers = FusedOptimizer | Iterable[FusedOptimizer]


def fp32_state_dict(model: Module, optimizer: Optimizers) -> dict[str, Any]:
    """`model.state_dict()` with the float32 values of its bfloat16 parameters.

    Args:
        model: any; parameters may be DTensors, whose shards are given.
        optimizer: over all or some of its parameters, made with `master_weight_bits=32`; or several
            of them. A parameter without a remainder there has the value that it shows.

    Returns:
        Copies of bfloat16 parameters as float32; everything else as `model.state_dict()` has it.

    Raises:
        ValueError: the optimizer is not made with `master_weight_bits=32`, or has no parameter of
            the model.
    """
    state_dict: dict[str, Any] = model.state_dict(keep_vars=True)
    owners = _owners(state_dict, optimizer)
    for name, value in state_dict.items():
        if isinstance(value, Parameter) and value.dtype == torch.bfloat16:
            view, _ = owners.get(id(value), (None, {}))
            state_dict[name] = value.detach().float() if view is None else _float32(view, value)
        elif isinstance(value, Tensor):
            state_dict[name] = value.detach()
    return state_dict


def load_fp32_state_dict(
    model: Module, optimizer: Optimizers, state_dict: Mapping[str, Any], strict: bool = True
) -> Any:
    """Load float32 weights into bfloat16 parameters and their remainders: `fp32_state_dict` back.

    Args:
        model: as `fp32_state_dict` takes it.
        optimizer: likewise; what else it has of these parameters stays as it is. Give all that the
            model has: parameters of others are rounded. Load their state before: `load_state_dict`
            replaces remainders, and torch.distributed.checkpoint makes state to load into only
            where there is none.
        state_dict: by name; values of bfloat16 parameters may be of any real dtype.
        strict: see `torch.nn.Module.load_state_dict`.

    Returns:
        What `model.load_state_dict` does.

    Raises:
        ValueError: as `fp32_state_dict`.
        RuntimeError: names or shapes differ; see `torch.nn.Module.load_state_dict`. No remainder
            has been written then.
    """
    params = model.state_dict(keep_vars=True)
    owners = _owners(params, optimizer)
    rounded, remainders = dict(state_dict), []
    for name, value in state_dict.items():
        owner = owners.get(id(params.get(name)))
        if owner is not None and isinstance(value, Tensor):
            rounded[name] = _shardwise(lambda x: _split(x)[0], value)
            remainders.append((*owner, params[name], _shardwise(lambda x: _split(x)[1], value)))
    outcome = model.load_state_dict(rounded, strict)
    for view, group, param, remainder in remainders:
        state = view.state.setdefault(param, {})
        if view.rule.counts_step and not view.rule.has_state(state):
            state.update(new_state(view, param, group))  # torch asks for its step
        if REMAINDER not in state:
            state[REMAINDER] = torch.empty_like(param, dtype=torch.int16, requires_grad=False)
        state[REMAINDER].copy_(remainder)
        view.remainders.keep([(local(param), local(state[REMAINDER]))])
    return outcome


def _owners(params: Mapping[str, Any], optimizers: Any) -> dict[int, tuple[OptimizerView, Group]]:
    """By id of a parameter, the optimizer that has its float32 values, and its group."""
    owners: dict[int, tuple[OptimizerView, Group]] = {}
    ids = {*map(id, params.values())}
    for optimizer in optimizers if isinstance(optimizers, Iterable) else [optimizers]:
        options = optimizer._stepper.options if isinstance(optimizer, FusedOptimizer) else None
        if options is None or options.master_weight_bits is None:
            raise ValueError(
                f"{type(optimizer).__name__} has no float32 values of parameters; give an "
                "optimizer of triton_optim that was made with master_weight_bits=32, or use the "
                "model's own state_dict()"
            )
        view = optimizer._fused_view()
        if ids.isdisjoint(map(id, view.params)):
            raise ValueError(
                f"no parameter of {type(optimizer).__name__} is in the model; make the optimizer "
                "anew where load_state_dict(assign=True) replaced them"
            )
        owners |= {
            id(param): (view, group)
            for group in view.groups
            for param in group["params"]
            if options.keeps_remainder(param)
        }
    return owners


def _float32(view: OptimizerView, param: Tensor) -> Tensor:
    remainder = view.state.get(param, {}).get(REMAINDER)
    pairs = [] if remainder is None else [(local(param), local(remainder))]
    if remainder is None or view.remainders.stale(pairs):
        return param.detach().float()
    return _shardwise(_joined, param.detach(), remainder)


def _joined(param: Tensor, remainder: Tensor) -> Tensor:
    """As kernels/formats.py does."""
    high = param.view(torch.int16).int() << 16
    bits = high + remainder
    return torch.where((bits & 0x7FFFFFFF) >= 0x7FFF0000, high, bits).view(torch.float32)


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels/formats.py does."""
    value = value.float()
    bits = value.view(torch.int32)
    high = ((bits + 0x8000) >> 16).to(torch.int16).masked_fill_(value.isnan(), 0x7FC0)
    return high.view(torch.bfloat16), (bits << 16 >> 16).to(torch.int16)


def _shardwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What it returns of their elements; of DTensors, of their shards."""
    if not is_dtensor(tensors[0]):
        return function(*tensors)
    return dtensor_like(tensors[0], function(*map(local_of, tensors)))
