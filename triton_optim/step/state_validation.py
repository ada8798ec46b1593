"""What is refused of state: missing, of another shape or dtype, elsewhere.

As in validation.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch.variant import STORAGE_DTYPES
from ..options import Group
from ..rule import Rule, State
from ..storage import EIGHT_BITS, REMAINDER
from ..tensors.float8 import GROUP_SIZE
from ..tensors.layout import (
    is_contiguous_resolved,
    same_memory_order,
)
from ..tensors.sharding import (
    PLAIN_TYPES,
    is_dtensor,
    local,
    same_sharding,
    spec_of,
)
from .validation import describe


def check_requested(state: State, names: Iterable[str], flags: Collection[str], where: str) -> None:
    """Refuse state without a tensor that the group's options ask for."""
    for name in names if flags else ():
        if name not in state:
            options = ", ".join(sorted(flags)).lower()
            raise RuntimeError(
                f"state {name!r} of {where} is missing, which the options of its group ask for now "
                f"({options}) and did not when the state was made; change them back, or delete the "
                "parameter's entry of optimizer.state to start it afresh"
            )


def check_shapes(param: Tensor, state: State, names: Iterable[str], where: str) -> None:
    """Refuse state that no update of `param` could use, whichever way it goes."""
    for name in names:
        value = state.get(name)
        if not isinstance(value, Tensor):
            raise _bad_state(name, where, f"is {value!r}")
        if value.shape != param.shape:
            found = f"has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}"
            raise _bad_state(name, where, found)


def check_state(
    param: Tensor,
    state: State,
    dtypes: Mapping[str, torch.dtype | None],
    where: str,
    *,
    follows: bool,
) -> None:
    """Refuse state that the kernels could not use, as a wrong checkpoint brings it.

    Args:
        param: a parameter that the kernels take.
        state: its entry of `optimizer.state`; `check_shapes` has passed.
        dtypes: by name, of the tensors that the kernels update; None: one dtype of a parameter,
            the same for all of these.
        follows: whether state on another device is moved instead of refused.
    """
    found_dtypes = set()
    for name, dtype in dtypes.items():
        value, shard = local(state[name]), local(param)
        if is_dtensor(state[name]) != is_dtensor(param) or (
            is_dtensor(param) and not same_sharding(spec_of(state[name]), spec_of(param))
        ):
            found = "is not sharded as the parameter is (set_optimizer_state_dict shards it)"
        elif value.shape != shard.shape:
            found = f"has a shard of {tuple(value.shape)}, the parameter of {tuple(shard.shape)}"
        elif value.layout != torch.strided:
            found = f"is {value.layout}"
        elif dtype is not None and value.dtype != dtype:
            found = f"is {value.dtype}, and the optimizer's options ask for {dtype}"
        elif dtype == EIGHT_BITS and not same_memory_order(value, shard):
            found = "lies in memory in another order than the parameter, and so do its groups"
        elif dtype is None and (
            value.dtype not in STORAGE_DTYPES or value.is_complex() != param.is_complex()
        ):
            found = f"is {value.dtype}, the parameter {param.dtype}"
        elif value.is_meta or (
            value.device != shard.device and (dtype == EIGHT_BITS or not follows)
        ):
            found = f"is on {value.device}, the parameter on {shard.device}"
        elif type(value) not in PLAIN_TYPES or value.is_conj() or value.is_neg():
            found = f"is a {type(value).__name__} that has no memory of its own"
        else:
            found_dtypes |= {value.dtype} if dtype is None else set()
            continue
        raise _bad_state(name, where, found)
    if len(found_dtypes) > 1:
        raise _bad_state(", ".join(dtypes), where, f"mixes {sorted(map(str, found_dtypes))}")


def check_exponents(param: Tensor, state: State, name: str, where: str) -> None:
    """Refuse exponents that are not those of the groups of a parameter's shard."""
    value, groups = state.get(name), -(-local(param).numel() // GROUP_SIZE)
    held = local(value) if isinstance(value, Tensor) else None
    if held is None:
        raise _bad_state(name, where, f"is {value!r}")
    if held.shape != (groups,) or held.dtype != EIGHT_BITS or held.device != local(param).device:
        found = f"is {held.dtype} of shape {tuple(held.shape)} on {held.device}"
        raise _bad_state(name, where, f"{found}, not {EIGHT_BITS} of ({groups},)")
    if type(held) not in PLAIN_TYPES or not held.is_contiguous():
        raise _bad_state(name, where, f"is a {type(held).__name__} that is not contiguous")


def check_row_state(param: Tensor, state: State, name: str, dtype: torch.dtype, where: str) -> None:
    """Refuse state that has not one number for each row of its parameter."""
    value, shape = state.get(name), param.shape[:1]
    if not isinstance(value, Tensor):
        raise _bad_state(name, where, f"is {value!r}")
    if value.shape != shape:
        found = f"has shape {tuple(value.shape)}, one number a row is {tuple(shape)}"
    elif value.dtype != dtype:
        found = f"is {value.dtype}, not {dtype}"
    elif value.device != param.device:
        found = f"is on {value.device}, the parameter on {param.device}"
    elif type(value) not in PLAIN_TYPES or not is_contiguous_resolved(value):
        found = f"is a {type(value).__name__} that does not lie in memory as it is"
    else:
        return
    raise _bad_state(name, where, found)


def check_counter(state: State, name: str, where: str) -> None:
    """Refuse a step counter, or another scalar, that is not one real number in a tensor."""
    value = state.get(name)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex() or value.is_meta:
        raise _bad_state(name, where, f"is {value!r}")


def check_values(state: Mapping[Any, Any]) -> None:
    """Refuse a checkpoint's tensors on the meta device: there are no values to load."""
    for index, entry in state.items():
        for name, value in entry.items() if isinstance(entry, Mapping) else ():
            if isinstance(value, Tensor) and value.is_meta:
                raise _bad_state(name, f"parameter {index}", "is on meta and has no values")


def check_entries(rule: Rule, state: Mapping[Any, Any], groups: Sequence[Group]) -> None:
    """Refuse a loaded state that is not that of the parameters at all.

    It is by parameter, or by index where no parameter has it. Older ones have a number as `step`.
    """
    for key in state:
        if isinstance(key, int):
            count = sum(len(group["params"]) for group in groups)
            raise RuntimeError(
                f"the state dict has state for parameter {key}, but the optimizer has {count} "
                "parameters; load the state_dict of an optimizer over the same parameters"
            )
    names = rule.counters if rule.counts_step else ()
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            entry = state.get(param, {})
            if not isinstance(entry, Mapping):
                where = describe(group, index, position)
                raise RuntimeError(f"the state of {where} is {entry!r}; it must be a dict")
            for name in () if entry.keys() <= {REMAINDER} else names:
                if not hasattr(entry.get(name), "__float__"):
                    where = describe(group, index, position)
                    raise _bad_state(name, where, f"is {entry.get(name)!r}")


def _bad_state(name: str, where: str, found: str) -> RuntimeError:
    return RuntimeError(
        f"state {name!r} of {where} {found}; load the state_dict of an optimizer over the same "
        "parameters, or delete the parameter's entry of optimizer.state to start it afresh"
    )
