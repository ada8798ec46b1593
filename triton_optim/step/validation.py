"""What is refused before anything is written.

Each function raises a RuntimeError, if not said otherwise, that names the parameter and the remedy.
Their `where` is a parameter in words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..options import Group, Options
from ..rule import Rule
from ..tensors.layout import (
    is_non_overlapping_and_dense,
)
from ..tensors.sharding import (
    PLAIN_TYPES,
    device_types,
    is_dtensor,
    local,
    sharding_unsupported,
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


def check_groups(groups: Sequence[Group], names: Collection[str]) -> None:
    """Refuse loaded groups of another optimizer."""
    for index, group in enumerate(groups):
        if missing := sorted({*names} - group.keys()):
            raise RuntimeError(
                f"group {index} of the state dict has no {missing}; load the state_dict of the "
                "same kind of optimizer"
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
