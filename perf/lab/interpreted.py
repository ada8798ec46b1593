"""Every kernel that the optimizers can launch, and what a step with it moves, interpreted.

    python -m lab.interpreted sm_90

prints one JSON list, an item a kernel. `perf/audit_kernels.py` runs it, in a process of its own:
Triton either interprets or compiles.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from inspect import signature
from itertools import combinations, product
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import Parameter

import triton_optim
from lab.traffic import Traffic, watched
from triton_optim.launch import backend, tuning
from triton_optim.launch.launcher import UpdateLaunch, record_launches
from triton_optim.step.launch_group import LaunchGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# parameter, gradient, state
STORAGES = (
    *((dtype, dtype, dtype) for dtype in DTYPES),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)
# Where a GradScaler, clipping and skipping meet in one kernel: the most that it can be asked.
GATED_STORAGES = (STORAGES[0], STORAGES[4])
CHUNKS = 2  # of a tensor, whole ones
TENSORS = 2  # a group each


class Step(NamedTuple):
    """One kernel, and what a step with it moves."""

    rule: str
    variant: backend.Variant
    n_hypers: int
    bytes_per_param: float
    launches: int

    @property
    def storage(self) -> tuple[str, str, str]:
        """Dtypes of parameter, gradient and state."""
        return self.variant.param_dtype, self.variant.grad_dtype, self.variant.state_dtype

    @property
    def name(self) -> str:
        flags = "+".join(sorted(self.variant.flags)) or "-"
        storage = "/".join(dtype.replace("float", "f") for dtype in self.storage)
        aligned = "" if self.variant.aligned else " misaligned"
        gated = " gated" if self.variant.gate else ""
        return f"{self.rule.removesuffix('_rule')} {flags} {storage}{gated}{aligned}"

    def misaligned(self) -> Step:
        """The same over addresses that are no multiple of 16 bytes."""
        return self._replace(variant=self.variant._replace(aligned=False))

    def as_json(self) -> dict[str, Any]:
        sets = {"flags": sorted(self.variant.flags), "gate": sorted(self.variant.gate)}
        return self._asdict() | {"variant": self.variant._asdict() | sets}

    @classmethod
    def from_json(cls, item: dict[str, Any]) -> Step:
        sets = {name: frozenset(item["variant"][name]) for name in ("flags", "gate")}
        return cls(**item | {"variant": backend.Variant(**item["variant"] | sets)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", help="whose block sizes are used, such as sm_90")
    parser.add_argument("optimizer", nargs="*", default=triton_optim.OPTIMIZERS)
    args = parser.parse_args()
    storages = [*((False, s) for s in STORAGES), *((True, s) for s in GATED_STORAGES)]
    # Without state, its dtype makes no other kernel.
    steps = {
        (step.rule, step.variant): step
        for name in args.optimizer
        for kwargs, (gated, storage) in product(flag_sets(name), storages)
        for step in [measure(args.architecture, name, kwargs, storage, gated=gated)]
    }
    print(json.dumps([step.as_json() for step in steps.values()]))


def flag_sets(name: str) -> list[dict[str, Any]]:
    """Arguments of an optimizer that reach its flag sets, one each: all of its switches are tried.

    A switch is an argument that is off by default, such as `maximize=False` or `momentum=0`.
    """
    make = getattr(triton_optim, name)
    defaults = {p.name: p.default for p in signature(make).parameters.values()}
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
            if optimizer._group_refusal(group) is None:
                found.setdefault(optimizer._flags(group), kwargs)
    return list(found.values())


def measure(
    architecture: str,
    name: str,
    kwargs: dict[str, Any],
    storage: tuple[torch.dtype, torch.dtype, torch.dtype],
    *,
    gated: bool = False,
) -> Step:
    """An optimizer's second step over whole chunks of the size that a GPU is given.

    Gated: under a GradScaler, clipped, skipped where it is not finite.
    """
    param_dtype, grad_dtype, state_dtype = storage

    def config(variant: backend.Variant, *_: object) -> tuning.Config:
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
            for key in optimizer._state_names(optimizer.param_groups[0]):
                state[key] = state[key].to(state_dtype)
            assert param.grad is not None
            param.grad.data = param.grad.data.to(grad_dtype)
        with patch.object(
            LaunchGroup, "update", _counted(LaunchGroup.update, traffic := Traffic())
        ):
            launches.clear()
            optimizer.step()
    updates = [launch for launch in launches if isinstance(launch, UpdateLaunch)]
    variant, tables = updates[0].variant, updates[0].tables
    return Step(
        optimizer._rule,
        variant,
        tables.hypers.shape[1],
        (traffic.loaded + traffic.stored) / (TENSORS * numel),
        len(updates),
    )


def _counted(update: Callable[..., None], traffic: Traffic) -> Callable[..., None]:
    """`LaunchGroup.update`, its traffic counted."""

    def counted(table: LaunchGroup, *args: Any) -> None:
        with watched(traffic.count):
            update(table, *args)

    return counted


if __name__ == "__main__":
    main()
