"""Every kernel that the optimizers can launch, and what a step with it moves, interpreted.

    python -m lab.interpreted sm_90

prints one JSON list, an item a kernel. `perf/audit_kernels.py` runs it, in a process of its own:
Triton either interprets or compiles.
"""

from __future__ import annotations

import argparse
import json
import os
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
from triton_optim import runtime, tuning
from triton_optim.launch import UpdateLaunch, recorded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# parameter, gradient, state
STORAGES = (
    *((dtype, dtype, dtype) for dtype in DTYPES),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)
CHUNKS = 2  # of a tensor, whole ones
TENSORS = 2  # a group each


class Step(NamedTuple):
    """One kernel, and what a step with it moves."""

    rule: str
    variant: runtime.Variant
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
        return f"{self.rule.removesuffix('_rule')} {flags} {storage}{aligned}"

    def misaligned(self) -> Step:
        """The same over addresses that are no multiple of 16 bytes."""
        return self._replace(variant=self.variant._replace(aligned=False))

    def as_json(self) -> dict[str, Any]:
        variant = self.variant._asdict() | {"flags": sorted(self.variant.flags)}
        return self._asdict() | {"variant": variant}

    @classmethod
    def from_json(cls, item: dict[str, Any]) -> Step:
        flags = frozenset(item["variant"]["flags"])
        return cls(**item | {"variant": runtime.Variant(**item["variant"] | {"flags": flags})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", help="whose block sizes are used, such as sm_90")
    parser.add_argument("optimizer", nargs="*", default=triton_optim.OPTIMIZERS)
    args = parser.parse_args()
    # Without state, its dtype makes no other kernel.
    steps = {
        (step.rule, step.variant): step
        for name in args.optimizer
        for kwargs, storage in product(flag_sets(name), STORAGES)
        for step in [measure(args.architecture, name, kwargs, storage)]
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
) -> Step:
    """An optimizer's second step over whole chunks of the size that a GPU is given."""
    param_dtype, grad_dtype, state_dtype = storage

    def config(variant: runtime.Variant, *_: object) -> tuning.Config:
        return tuning.config(architecture, half=variant.half)

    with patch.object(runtime, "config", config), recorded() as launches:
        numel = CHUNKS * max(tuning.config(architecture, half=half).chunk for half in (False, True))
        params = [Parameter(torch.randn(numel).to(param_dtype)) for _ in range(TENSORS)]
        make = getattr(triton_optim, name)
        optimizer = make([{"params": [param]} for param in params], **kwargs, fused=True)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        for param in params:
            state = optimizer.state[param]
            for key in optimizer._state_names(optimizer.param_groups[0]):
                state[key] = state[key].to(state_dtype)
            assert param.grad is not None
            param.grad.data = param.grad.data.to(grad_dtype)
        launches.clear()
        traffic = Traffic()
        with watched(traffic.count):
            optimizer.step()
    update = launches[0]
    assert isinstance(update, UpdateLaunch)
    variant, tables = update.variant, update.tables
    return Step(
        optimizer._rule,
        variant,
        tables.hypers.shape[1],
        (traffic.loaded + traffic.stored) / (TENSORS * numel),
        len(launches),
    )


if __name__ == "__main__":
    main()
