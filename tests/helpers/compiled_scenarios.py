"""What `test_launch.py` shows with compiled kernels. Run without TRITON_INTERPRET.

Prints one JSON object: by scenario, None or the traceback of what went wrong.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from lab.dry_gpu import DryGPU, dry_gpu
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel

import triton_optim
from triton_optim.kernels.formats import FLOAT64
from triton_optim.kernels.multi_tensor import multi_tensor_kernel

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("Adagrad", {"lr_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("AdamW", {}),
]
SPARSE_OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("Adagrad", {"lr_decay": 0.1}),
    ("RMSprop", {"sparse": "lazy"}),
    ("RowwiseAdagrad", {}),
]


def _params(*numels: int, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    params = [Parameter(torch.randn(numel, dtype=dtype)) for numel in numels]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def nothing_is_compiled_after_the_first_step(gpu: DryGPU) -> None:
    for name, kwargs in OPTIMIZERS:
        make = getattr(triton_optim, name)
        params = _params(1000, 7)
        optimizer = make(params, **kwargs)
        before = gpu.n_compiled()
        optimizer.step()
        assert gpu.n_compiled() == before + 1, name
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
            optimizer.step()
            scheduler.step()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        optimizer.step()
        for numels in ((1,), (16,), (17, 64, 1024), (2**20 + 1, *range(1, 300))):
            others = _params(*numels)
            groups = [{"params": others[i::3], "lr": 0.1 * (i + 1)} for i in range(3)]
            make(groups, lr=1.0, **kwargs).step()
        assert gpu.n_compiled() == before + 1, name


def a_launch_is_what_triton_would_launch(gpu: DryGPU) -> None:
    for name, kwargs in OPTIMIZERS:
        optimizer = getattr(triton_optim, name)(_params(5000, 3), **kwargs)
        optimizer.step()
        launches = optimizer._stepper.plan.launch_groups[0]._launches[frozenset()]
        assert len(launches) == 1
        ours, launch = gpu.launches[-1], launches[0]
        multi_tensor_kernel[launch.grid](**launch.arguments, **launch.options)
        theirs = gpu.launches[-1]
        assert _addressed(ours[:6] + ours[9:]) == _addressed(theirs[:6] + theirs[9:])


def _addressed(arguments: Iterable[Any]) -> list[Any]:
    return [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]


@contextmanager
def _profiled() -> Iterator[None]:
    """A hook before launches, where this version of Triton has it."""
    has_hook = hasattr(CompiledKernel, "launch_enter_hook")
    owner = CompiledKernel if has_hook else triton.knobs.runtime
    hook = owner.launch_enter_hook
    if hasattr(hook, "add"):
        hook.add(id)
        yield
        hook.remove(id)
    else:
        with patch.object(owner, "launch_enter_hook", id):
            yield


def a_profiler_is_told_the_bytes(gpu: DryGPU) -> None:
    optimizer = triton_optim.RMSprop(_params(1000, 24))
    with _profiled():
        optimizer.step()
    metadata = gpu.launches[-1][6].get()
    assert metadata["bytes"] == 20 * 1024
    assert metadata["name"] == "multi_tensor_kernel.rmsprop_rule"


def everything_is_compiled_before_anything_is_launched(gpu: DryGPU) -> None:
    params = [*_params(10), *_params(10, dtype=torch.float64)]
    optimizer = triton_optim.RMSprop(params, alpha=0.5)
    _fail_to_compile(gpu, optimizer, lambda flags: flags["FORMATS"] & 15 == FLOAT64.value)
    launched = len(gpu.launches)
    optimizer.step()
    assert len(gpu.launches) == launched + 2


def _fail_to_compile(gpu: DryGPU, optimizer: Any, fails: Callable[[dict[str, Any]], bool]) -> None:
    """A step of which one kernel cannot be compiled: nothing is launched, nothing written."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    warmup = triton.JITFunction.warmup

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if fails(kwargs):
            raise MemoryError
        return warmup(self, *args, **kwargs)

    launched = len(gpu.launches)
    with patch.object(triton.JITFunction, "warmup", failing):
        try:
            optimizer.step()
        except MemoryError:
            pass
        else:
            raise AssertionError("the second kernel was not compiled")
    assert len(gpu.launches) == launched
    assert not optimizer.state
    assert all(map(torch.equal, params, before))


def a_gated_step_is_told_this_steps_scalars(gpu: DryGPU) -> None:
    """A norm, the counts and an update: with new scalars at every step, and nothing compiled."""
    params = _params(20_000, 3)
    optimizer = triton_optim.RMSprop(params, max_grad_norm=1.0, skip_nonfinite=True)
    kept = []
    for step in range(3):
        told = [torch.zeros(()), torch.ones(())]
        kept += told  # or the next ones would lie in their places
        optimizer.found_inf, optimizer.grad_scale = told  # type: ignore[attr-defined]
        before, launched = gpu.n_compiled(), len(gpu.launches)
        optimizer.max_grad_norm = 1.0 + step
        optimizer.step()
        assert step == 0 or gpu.n_compiled() == before
        _, _, update = gpu.launches[launched:]
        assert {t.data_ptr() for t in told} <= set(update[9:])
    scalars = [t.data_ptr() for t in kept[:-2]]
    assert not set(scalars) & set(gpu.launches[-1][9:])


def clipping_gradients_is_two_launches(gpu: DryGPU) -> None:
    params = [*_params(20_000, 3), *_params(100, dtype=torch.bfloat16)]
    launched = len(gpu.launches)
    triton_optim.clip_grad_norm_(params[:2], 1.0)
    assert len(gpu.launches) == launched + 2
    triton_optim.clip_grad_norm_(params, 1.0)
    assert len(gpu.launches) == launched + 2 + 4


def rows_of_any_number_take_the_same_kernels(gpu: DryGPU) -> None:
    """One that makes keys, for all optimizers, and one that updates."""
    keys = 1
    for name, kwargs in SPARSE_OPTIMIZERS:
        make = getattr(triton_optim, name)
        tables = [Parameter(torch.zeros(rows, 16)) for rows in (100, 7)]
        optimizer = make(tables, **kwargs)
        before = gpu.n_compiled()
        for step, count in enumerate((1, 16, 17, 5000)):
            for table in tables:
                table.grad = _sparse(table, count)
            optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
            launched = len(gpu.launches)
            optimizer.step()
            assert len(gpu.launches) == launched + 2, name
            assert gpu.n_compiled() == before + keys + 1, name
        assert gpu.launches[-1][0] > 16  # programs
        for n_tables in (1, 16, 40):
            others = [Parameter(torch.zeros(5 + n, 16)) for n in range(n_tables)]
            for table in others:
                table.grad = _sparse(table, 3)
            groups = [{"params": others[i::3], "lr": 0.1} for i in range(min(3, n_tables))]
            make(groups, **kwargs).step()
        assert gpu.n_compiled() == before + keys + 1, name
        keys = 0


def _sparse(param: Tensor, count: int) -> Tensor:
    ids = torch.arange(count).remainder(len(param)).view(1, -1)
    return torch.sparse_coo_tensor(ids, torch.ones(count, 16), param.shape)


def rows_are_compiled_before_anything_is_launched(gpu: DryGPU) -> None:
    tables = [Parameter(torch.zeros(9, 16)), Parameter(torch.zeros(9, 32))]
    for table in tables:
        table.grad = torch.ones_like(table).to_sparse(1)
    optimizer = triton_optim.RowwiseAdagrad(tables)
    _fail_to_compile(gpu, optimizer, lambda flags: flags.get("COLUMNS") == 32)
    launched = len(gpu.launches)
    optimizer.step()
    assert len(gpu.launches) == launched + 3


SCENARIOS: tuple[Callable[[DryGPU], None], ...] = (
    nothing_is_compiled_after_the_first_step,
    a_launch_is_what_triton_would_launch,
    a_profiler_is_told_the_bytes,
    everything_is_compiled_before_anything_is_launched,
    a_gated_step_is_told_this_steps_scalars,
    clipping_gradients_is_two_launches,
    rows_of_any_number_take_the_same_kernels,
    rows_are_compiled_before_anything_is_launched,
)


def main() -> None:
    outcomes: dict[str, str | None] = {}
    with dry_gpu() as gpu:
        for scenario in SCENARIOS:
            try:
                scenario(gpu)
                outcomes[scenario.__name__] = None
            except Exception:
                outcomes[scenario.__name__] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
