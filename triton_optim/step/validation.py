"""What is refused before anything is written.

Each function raises a RuntimeError, if not said otherwise, that names the parameter and the remedy.
Their `where` is a parameter in words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..launch.variant import STORAGE_DTYPES
from ..options import Group, Options
from ..rule import Rule, State
from ..storage import EIGHT_BITS, REMAINDER
from ..tensors.float8 import GROUP_SIZE
from ..tensors.layout import (
    is_contiguous_resolved,
    is_non_overlapping_and_dense,
    same_memory_order,
)
from ..tensors.sharding import (
    PLAIN_TYPES,
    device_types,
    is_dtensor,
    local,
    same_sharding,
    sharding_unsupported,
    spec_of,
)


def describe(group: Group, index: int, position: int) -> str:
    """A parameter in words: where it stands, and its name if it has one."""
    names = group.get("param_names")
    name = f" ({names[position]!r})" if names and position < len(names) else ""
    index, position = place_of(group, index, position)
    return f"parameter {position}{name} of group {index}"


def place_of(group: Group, index: int, position: int) -> tuple[int, int]:
    """The group of a parameter in the whole optimizer, and where it stands there."""
    if "_places" in group:  # that of a GradBucket
        index, position = group["_places"][position]
    return index, position


def check_tensors(param: Tensor, grad: Tensor, where: str) -> None:
    """Refuse a parameter that cannot be written, and a gradient that is not its parameter's.

    Whichever way the parameter goes; but subclasses of Tensor other than DTensor know best
    themselves.
    """
    if is_dtensor(param) and sharding_unsupported(param, grad) is None:
        param, grad = local(param), local(grad)
    if type(param) not in PLAIN_TYPES or type(grad) not in PLAIN_TYPES:
        return
    if param.is_meta:
        raise RuntimeError(
            f"{where} is on the meta device and has no values; bring it to a real one with "
            "to_empty() or give the optimizer the parameter that replaced it"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {where} is {tuple(grad.shape)} on {grad.device}, the parameter "
            f"{tuple(param.shape)} on {param.device}; clear it with zero_grad() and run backward "
            "again"
        )
    if param.layout == torch.strided and _is_expanded(param):
        raise RuntimeError(
            f"{where} is expanded: several of its elements share one place in memory; clone() it"
        )


def check_indices(ids: Tensor, shape: Sequence[int], where: str) -> None:
    """Refuse a sparse gradient of rows that its parameter has not; on a GPU it would have to wait.

    `ids` is int64 [sparse dims, rows of the gradient].
    """
    if not ids.is_cpu or ids.numel() == 0:
        return
    for of_dim, size in zip(ids, shape, strict=False):
        for outermost in of_dim.aminmax():
            if not 0 <= outermost < size:
                raise RuntimeError(
                    f"the sparse gradient of {where} has a row {int(outermost)}, the parameter "
                    f"{size} rows; look for what made the ids, or clear it with zero_grad()"
                )


def _is_expanded(tensor: Tensor) -> bool:
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return tensor.numel() > 0 and any(stride == 0 and size > 1 for stride, size in strides)


def check_unscaling(grads: Sequence[Tensor | None], copied: Iterable[tuple[int, Tensor]]) -> None:
    """Refuse gradients that cannot be unscaled in place, or in the copy that some have."""
    for _, grad in copied:
        if _is_expanded(grad):
            raise RuntimeError(
                f"a gradient of shape {tuple(grad.shape)} is expanded: several of its elements "
                "share one place in memory, so that it cannot be unscaled there; clone() it"
            )
    addresses = [grad.data_ptr() for grad in grads if grad is not None and grad.numel()]
    if len(set(addresses)) != len(addresses):
        raise RuntimeError(
            "two parameters have one gradient tensor, which would be unscaled twice; clone() it"
        )


def check_meshes(params: Iterable[Tensor]) -> None:
    """Refuse a norm over parameters that are sharded over several kinds of devices."""
    types = device_types(params)
    if len(types) > 1:
        raise RuntimeError(
            f"parameters lie on meshes of {' and '.join(sorted(types))} devices, whose gradients "
            "have no norm in common; give each mesh its own optimizer, or leave max_grad_norm out"
        )


def check_no_overlap(tensors: Iterable[tuple[Tensor, str]]) -> None:
    """Refuse tensors that share memory: the kernel writes them in no particular order.

    Args:
        tensors: what one step writes, each with its description. Of one that is not dense, only
            its first element counts.
    """
    spans = sorted((*_span(tensor), name) for tensor, name in tensors if tensor.numel())
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise RuntimeError(
                f"{name} and {other} share memory: one update would overwrite the other; tie "
                "weights by using one Parameter in both places, or clone() one of the two"
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where it begins and ends in memory; of one that is not dense, its first element."""
    dense = is_non_overlapping_and_dense(tensor)
    n_bytes = tensor.nbytes if dense else tensor.element_size()
    return tensor.data_ptr(), tensor.data_ptr() + n_bytes


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


def check_groups(groups: Sequence[Group], names: Collection[str]) -> None:
    """Refuse loaded groups of another optimizer."""
    for index, group in enumerate(groups):
        if missing := sorted({*names} - group.keys()):
            raise RuntimeError(
                f"group {index} of the state dict has no {missing}; load the state_dict of the "
                "same kind of optimizer"
            )


def _bad_state(name: str, where: str, found: str) -> RuntimeError:
    return RuntimeError(
        f"state {name!r} of {where} {found}; load the state_dict of an optimizer over the same "
        "parameters, or delete the parameter's entry of optimizer.state to start it afresh"
    )


def check_fallback(
    options: Options,
    param: Tensor,
    grad: Tensor,
    group: Group,
    names: Iterable[str],
    where: str,
    reason: str,
) -> None:
    """Refuse torch's implementation for a parameter where it does not do what was asked for."""
    if option := options.beyond_torch(param, names, by_rows=False):
        raise RuntimeError(f"{option}, but the kernels cannot take {where}: {reason}")
    if options.is_capturable(group) and "capturable" not in group:
        raise RuntimeError(f"capturable=True, but the kernels cannot take {where}: {reason}")
    if grad.layout != torch.strided:
        _check_has_norm(options, grad, where)


def check_row_wise(
    options: Options, param: Tensor, grad: Tensor, group: Group, names: Iterable[str], where: str
) -> None:
    """Refuse to update row by row where that does not do what was asked for."""
    if option := options.beyond_torch(param, names, by_rows=True):
        raise RuntimeError(
            f"{option}, but {where} is updated by rows; make its gradient dense, or give it an "
            "optimizer of its own"
        )
    if options.is_capturable(group):
        raise RuntimeError(
            f"capturable=True, but {where} is updated by rows, of which a capture would repeat "
            "those of this step; leave `capturable` out, or give it an optimizer of its own"
        )
    _check_has_norm(options, grad, where)


def _check_has_norm(options: Options, grad: Tensor, where: str) -> None:
    if options.max_grad_norm is not None:
        raise RuntimeError(
            f"max_grad_norm takes no {grad.layout} gradient, as that of {where}; make the "
            "gradient dense, or give the parameter an optimizer of its own"
        )


def check_rule(rule: Rule, groups: Iterable[Group], known_flags: Collection[str] | None) -> None:
    """Refuse a rule that asks for what its optimizer has not.

    Args:
        rule: the optimizer's.
        groups: its parameter groups.
        known_flags: names that were given to `triton_optim.flag`; None where there is no Triton.

    Raises:
        TypeError: it asks a group for a name that is no argument of the optimizer.
        ValueError: a flag was not made by `triton_optim.flag`.
    """
    if known_flags is not None and (unknown := sorted(rule.flags.keys() - {*known_flags})):
        raise ValueError(
            f"the flag {unknown[0]!r} of {rule.name} is unknown; make it beside the function: "
            f"{unknown[0]} = triton_optim.flag({unknown[0]!r})"
        )
    for group in groups:
        try:
            rule.active_flags(group)
            rule.values(group)
            for state in rule.states:
                if callable(state.initial):
                    state.initial(group)
            for initial in rule.scalars.initial.values() if rule.scalars is not None else ():
                initial(group)
            rule.state_names(group)
        except KeyError as error:
            raise TypeError(
                f"{rule.name} asks a parameter group for {error}, which is no argument of its "
                f"optimizer; there are {sorted(group.keys() - {'params'})}"
            ) from error
