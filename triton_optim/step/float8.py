"""State that is kept in 8 bits: made of other values, and as bfloat16 in a state dict."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..options import Group
from ..rule import State, StateTensor
from ..storage import EIGHT_BITS, EXPONENTS
from ..tensors import float8
from ..tensors.sharding import dtensor_like, is_dtensor, local
from .view import OptimizerView


def made(view: OptimizerView, item: StateTensor, param: Tensor, group: Group) -> State:
    """A state before the first update of a parameter, and what is kept beside it."""
    dtype = view.options.dtype_of(item.name, param)
    if dtype != EIGHT_BITS:
        return {item.name: item.new(param, group, dtype)}
    return encoded(item, param, item.new(param, group, torch.float32))


def encoded(item: StateTensor, param: Tensor, values: Tensor) -> State:
    """What is kept of a state's values: of a parameter's shape, sharded as it is."""
    laid_out = torch.empty_like(local(param), dtype=torch.float32).copy_(local(values))
    parts = float8.encode(laid_out.detach(), is_denominator=bool(item.is_denominator))
    if is_dtensor(param):
        codes, exponents = dtensor_like(param, parts[0]), dtensor_like(param, parts[1], rows=True)
        parts = codes, exponents
    return {item.name: parts[0], item.name + EXPONENTS: parts[1]}


def decoded_states(view: OptimizerView) -> defaultdict[Tensor, State]:
    """All state, with bfloat16 values, exactly, in place of codes and exponents."""
    items = {item.name + EXPONENTS: item for item in view.rule.states}
    states = defaultdict[Tensor, State](dict)
    for param, state in view.state.items():
        states[param] = {name: value for name, value in state.items() if name not in items}
        for name in items.keys() & state.keys():
            item = items[name]
            parts = local(state[item.name]), local(state[name])
            values = float8.decode(*parts, is_denominator=bool(item.is_denominator))
            is_sharded = is_dtensor(state[item.name])
            states[param][item.name] = dtensor_like(param, values) if is_sharded else values
    return states
