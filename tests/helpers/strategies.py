"""What random programs are made of: groups, tensors, layouts."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import torch
from cases import BLOCK
from guarded_memory import guarded
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from torch import Tensor

rates = st.sampled_from([0.01, 0.001, 0.0])
decays = st.sampled_from([0.0, 0.1])
common = {"lr": rates, "weight_decay": decays, "maximize": st.booleans()}
momenta: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]
GROUPS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "SGD": st.builds(dict, st.sampled_from(momenta), **common),
    "Adagrad": st.fixed_dictionaries(
        {**common, "lr_decay": decays, "eps": st.sampled_from([1e-10, 1e-2])}
    ),
    "RMSprop": st.fixed_dictionaries(
        {
            **common,
            "alpha": st.sampled_from([0.9, 0.99]),
            "eps": st.sampled_from([1e-8, 1e-2]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "centered": st.booleans(),
        }
    ),
    "Lion": st.fixed_dictionaries(
        {"lr": rates, "weight_decay": decays, "beta1": st.sampled_from([0.9, 0.5])}
    ),
    "Adam": st.fixed_dictionaries(
        {
            "lr": rates,
            "betas": st.tuples(st.sampled_from([0.9, 0.3]), st.sampled_from([0.999, 0.9])),
            "weight_decay": decays,
            "maximize": st.booleans(),
            "eps": st.sampled_from([1e-8, 1e-2]),
            "amsgrad": st.booleans(),
            "decoupled_weight_decay": st.booleans(),
        }
    ),
    "Adamax": st.fixed_dictionaries(
        {
            "lr": rates,
            "betas": st.tuples(st.sampled_from([0.9, 0.3]), st.sampled_from([0.999, 0.9])),
            "weight_decay": decays,
            "maximize": st.booleans(),
            "eps": st.sampled_from([1e-8, 1e-2]),
        }
    ),
    "NAdam": st.fixed_dictionaries(
        {
            "lr": rates,
            "betas": st.tuples(st.sampled_from([0.9, 0.3]), st.sampled_from([0.999, 0.9])),
            "weight_decay": decays,
            "maximize": st.booleans(),
            "eps": st.sampled_from([1e-8, 1e-2]),
            "momentum_decay": st.sampled_from([4e-3, 1.0]),
            "decoupled_weight_decay": st.booleans(),
        }
    ),
    "ASGD": st.fixed_dictionaries(
        {
            "lr": rates,
            "lambd": st.sampled_from([1e-4, 0.1]),
            "alpha": st.sampled_from([0.75, 0.5]),
            "t0": st.sampled_from([1e6, 1.0]),
            "weight_decay": decays,
            "maximize": st.booleans(),
        }
    ),
    "RAdam": st.fixed_dictionaries(
        {
            "lr": rates,
            "betas": st.tuples(st.sampled_from([0.9, 0.3]), st.sampled_from([0.999, 0.9])),
            "weight_decay": decays,
            "maximize": st.booleans(),
            "eps": st.sampled_from([1e-8, 1e-2]),
            "decoupled_weight_decay": st.booleans(),
        }
    ),
    "Adadelta": st.fixed_dictionaries(
        {
            "lr": rates,
            "rho": st.sampled_from([0.9, 0.5]),
            "weight_decay": decays,
            "maximize": st.booleans(),
            "eps": st.sampled_from([1e-6, 1e-2]),
        }
    ),
    "Rprop": st.fixed_dictionaries(
        {
            "lr": rates,
            "etas": st.sampled_from([(0.5, 1.2), (0.1, 2.0)]),
            "maximize": st.booleans(),
        }
    ),
}


class Layout(NamedTuple):
    """Where a tensor's elements lie."""

    order: int  # of the dimensions in memory: 0 is torch's, every other one is shuffled
    offset: int  # elements beyond an aligned address
    gap: bool  # every other element is somebody else's

    def copy(self, values: Tensor) -> Tensor:
        dims = list(range(values.dim()))
        if self.order:
            Random(self.order).shuffle(dims)
        if self.gap:
            return guarded(torch.stack([values, values], -1), self.offset)[..., 0]
        inverse = sorted(range(len(dims)), key=dims.__getitem__)
        return guarded(values.permute(dims).contiguous(), self.offset).permute(inverse)


class Slot(NamedTuple):
    """What a parameter is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout


# torch's own arithmetic, which takes what has gaps, rounds 16-bit values after every operation.
layouts = st.builds(
    Layout, st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([0, 0, 1, 3]), st.just(False)
)
gaps = st.just(Layout(0, 0, True))
shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5) | st.sampled_from(
    [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3, BLOCK)]
)
wide = st.sampled_from([torch.float32, torch.float64, torch.complex64])
slots = st.builds(
    Slot, shapes, wide | st.sampled_from([torch.bfloat16, torch.float16]), layouts
) | st.builds(Slot, shapes, wide, gaps)
group_slots = st.lists(slots, min_size=1, max_size=4)
indices = st.integers(0, 11)
