"""The kernels of dense gradients that the optimizers launch, and what a step moves: interpreted.

Only with TRITON_INTERPRET.
"""

from __future__ import annotations

from inspect import signature
from itertools import combinations, product
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import Parameter

import triton_optim
from lab.dense_kernels import Kernel
from lab.traffic import Traffic, watched
from triton_optim.kernels.random_bits import EIGHTS, SINGLY
from triton_optim.launch import backend, tuning
from triton_optim.launch.launcher import UpdateLaunch, record_launches
from triton_optim.launch.variant import Variant
from triton_optim.step.launch_group import LaunchGroup
from triton_optim.storage import StorageOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Storage = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient, state
STORAGES: tuple[Storage, ...] = (
    *((dtype, dtype, dtype) for dtype in DTYPES),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)
# Where a GradScaler, clipping and skipping meet in one kernel: the most that it can be asked.
GATED_STORAGES = (STORAGES[0], STORAGES[3], STORAGES[4])
# Options of storage and what they make of bfloat16 parameters, and the optimizers with which they
# are tried. Adam's rule is AdamW's.
FORMATS: tuple[tuple[dict[str, Any], Storage], ...] = (
    ({"master_weight_bits": 32}, STORAGES[4]),
    ({"master_weight_bits": 32, "state_dtype": torch.bfloat16}, STORAGES[1]),
    ({"stochastic_rounding": True}, STORAGES[1]),
    ({"master_weight_bits": 32, "state_dtype": "8bit"}, (*STORAGES[1][:2], torch.uint8)),
)
FORMATTED: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.5},
    "Adagrad": {},
    "RMSprop": {},
    "Adam": {"decoupled_weight_decay": True},
}
CHUNKS = 4  # of a tensor, whole ones
TENSORS = 2  # a group each


def kernels_of(architecture: str, name: str, every: int) -> list[Kernel]:
    """An optimizer's, with an architecture's block sizes: over aligned addresses, then others.

    Args:
        every: which of them, one in so many.
    """
    storages = [*((False, s) for s in STORAGES), *((True, s) for s in GATED_STORAGES)]
    # Without state, its dtype makes no other kernel.
    found = {
        kernel.variant: kernel
        for kwargs, (gated, storage) in [*product(flag_sets(name), storages)][::every]
        for kernel in [measure(architecture, name, kwargs, storage, gated=gated)]
    }
    return [*found.values(), *(kernel.misaligned() for kernel in found.values())]


def formats_of(architecture: str, name: str, every: int) -> list[Kernel]:
    """Those of an optimizer with options of storage: over aligned addresses, others, and shards."""
    whole = [
        measure(architecture, name, {**FORMATTED[name], **options}, storage, gated=gated)
        for (options, storage), gated in [*product(FORMATS, (False, True))][::every]
    ]
    shards = [
        kernel._replace(variant=kernel.variant._replace(sharding=sharding))
        for kernel, sharding in product(whole, (EIGHTS.value, SINGLY.value))
        if kernel.variant.rounds
    ]
    return [*whole, *(kernel.misaligned() for kernel in whole), *shards]


def flag_sets(name: str) -> list[dict[str, Any]]:
    """Arguments of an optimizer that reach its flag sets, one each: all of its switches are tried.

    A switch is an argument that is off by default, such as `maximize=False` or `momentum=0`. That
    of decoupled decay, which changes every rule's last line alike, is tried alone and with all.
    """
    make = getattr(triton_optim, name)
    parameters = signature(make).parameters.values()
    storage = StorageOptions.__annotations__  # see `formats_of`
    defaults = {p.name: p.default for p in parameters if p.name not in storage}
    on = {n: True if d is False else 0.5 for n, d in defaults.items() if d is False or d == 0}
    found: dict[frozenset[str], dict[str, Any]] = {}
    for n_on in range(len(on) + 1):
        for names in combinations(on, n_on):
            kwargs = {n: on[n] for n in names}
            try:
                optimizer = make([Parameter(torch.empty(1))], **kwargs)
            except (ValueError, RuntimeError):  # such as Nesterov without momentum
                continue
            group = optimizer.param_groups[0]
            if optimizer._stepper.options.unsupported(group) is None:
                found.setdefault(optimizer._current_rule().active_flags(group), kwargs)
    decoupled = [f for f in found if "DECOUPLED" in f and "DECOUPLED" not in make.rule.flags]
    between = sorted(decoupled, key=len)[1:-1]
    return [kwargs for flags, kwargs in found.items() if flags not in between]


def measure(
    architecture: str,
    name: str,
    kwargs: dict[str, Any],
    storage: Storage,
    *,
    gated: bool = False,
) -> Kernel:
    """An optimizer's second step over whole chunks of the size that a GPU is given.

    Gated: under a GradScaler, clipped, skipped where it is not finite.
    """
    param_dtype, grad_dtype, state_dtype = storage

    def config(variant: Variant, *_: object) -> tuning.Config:
        return tuning.config(architecture, half=variant.half)

    with patch.object(backend, "config", config), record_launches() as launches:
        numel = CHUNKS * max(tuning.config(architecture, half=half).chunk for half in (False, True))
        params = [Parameter(torch.randn(numel).to(param_dtype)) for _ in range(TENSORS)]
        make = getattr(triton_optim, name)
        options = {"max_grad_norm": 1.0, "skip_nonfinite": True} if gated else {}
        groups = [{"params": [param]} for param in params]
        optimizer = make(groups, **kwargs, fused=True, **options)
        if gated:
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        for param in params:
            state = optimizer.state[param]
            for key in optimizer.rule.state_names(optimizer.param_groups[0]):
                state[key] = state[key].to(state_dtype)
            assert param.grad is not None
            param.grad.data = param.grad.data.to(grad_dtype)
        traffic, update = Traffic(), LaunchGroup.update

        def counted(group: LaunchGroup, *args: Any) -> None:
            with watched(traffic.count):
                update(group, *args)

        with patch.object(LaunchGroup, "update", counted):
            launches.clear()
            optimizer.step()
    updates = [launch for launch in launches if isinstance(launch, UpdateLaunch)]
    variant, tables = updates[0].variant, updates[0].tables
    return Kernel(
        optimizer.rule.name,
        variant,
        tables.hypers.shape[1],
        (traffic.loaded + traffic.stored) / (TENSORS * numel),
        len(updates),
    )
