"""What `test_distributed.py` shows with several processes.

Run as `distributed_scenarios.py BACKEND SIZE...`, once for all scenarios; with gloo, kernels run in
the interpreter. Prints one JSON object: by "scenario-size", None or what went wrong on which rank.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import STATEFUL_CASES, Case
from checkpoint_scenarios import checkpoint_scenarios
from clipping_scenarios import clipping_scenarios
from parallel_models import (
    PARALLELISMS,
    Parallelism,
    assert_equal,
    assert_kernels,
    ddp,
    ddp_bucket_view,
    fsdp,
    full_values,
    in_one_process,
    one_process,
    tp,
    train,
)
from process_groups import Scenario, World, outcomes
from storage_scenarios import storage_scenarios
from torch.nn import Module

import triton_optim
from triton_optim.testing.interpreter import speed_up

CASES = [case for case in STATEFUL_CASES if case.name != "sgd"]  # which keeps no state
# What is imported at a first step: once, before the processes fork.
PRELOAD = ("torch._dynamo", "torch.distributed.optim", "triton.experimental.gluon")


def the_same_as_in_one_process(parallelism: Parallelism, case: Case, world: World) -> None:
    parallel = parallelism(world)
    optimizer = case.ours(parallel.model.parameters())
    updated = train(parallel, optimizer)
    assert_equal(full_values(parallel.model, optimizer), full_values(*in_one_process(case, world)))
    assert_kernels(optimizer, updated)


def missing_gradients(parallelism: Parallelism, case: Case, world: World) -> None:
    """On every rank alike; norms are over those that are there, and no plan is made anew."""
    subsets = [(), (0, 3), (1,), (2, 4, 5), (0, 1, 2, 3, 4, 5, 6), ()]
    parallel, whole = parallelism(world), one_process(world)
    optimizer = case.ours(parallel.model.parameters(), max_grad_norm=0.1)
    reference = case.theirs(whole.model.parameters())
    plans = []

    def leave_out(model: Module, without: Sequence[int]) -> None:
        for i, param in enumerate(model.parameters()):
            if i in without:
                param.grad = None

    def clip(model: Module, without: Sequence[int]) -> None:
        leave_out(model, without)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    for step, without in enumerate(subsets):
        train(parallel, optimizer, [step], partial(leave_out, parallel.model, without))
        train(whole, reference, [step], partial(clip, whole.model, without))
        plans.append(optimizer._stepper.plan)
    values = full_values(whole.model, reference)
    assert_equal(full_values(parallel.model, optimizer), values)
    assert all(plan is plans[0] for plan in plans)


def zero(case: Case, world: World, **kwargs: Any) -> None:
    """Each process steps its own parameters and keeps their state."""
    parallel = ddp(world)
    optimizer = _zero(parallel.model, case, **kwargs)
    updated = train(parallel, optimizer)
    expected, _ = in_one_process(case, world)
    assert_equal(list(parallel.model.parameters()), list(expected.parameters()))
    assert_kernels(optimizer.optim, updated)


def zero_with_nothing_to_do(case: Case, world: World) -> None:
    """Two parameters: with four processes, two have none."""
    parallel, whole = ddp(world), one_process(world)
    optimizer = _zero(parallel.model.get_submodule("module.down"), case)
    assert len(optimizer.optim.param_groups[0]["params"]) == (1 if world.rank < 2 else 0)
    train(parallel, optimizer)
    train(whole, case.theirs(whole.model.get_submodule("down").parameters()))
    assert_equal(list(parallel.model.parameters()), list(whole.model.parameters()))


def zero_from_a_checkpoint(case: Case, world: World) -> None:
    parallel = ddp(world)
    optimizer = _zero(parallel.model, case)
    train(parallel, optimizer, range(2))
    optimizer.consolidate_state_dict()
    saved: list[Any] = [optimizer.state_dict() if world.rank == 0 else None]
    dist.broadcast_object_list(saved, device=world.device)
    _, expected = in_one_process(case, world, 2)
    # What was consolidated is on the CPU.
    assert_equal(saved[0]["state"], expected.state_dict()["state"], check_device=False)
    optimizer = _zero(parallel.model, case)
    optimizer.load_state_dict(saved[0])
    train(parallel, optimizer, [2])
    assert_equal(
        list(parallel.model.parameters()), list(in_one_process(case, world)[0].parameters())
    )


def _zero(model: Module, case: Case, **kwargs: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # with warnings, errors in pytest

    make = getattr(triton_optim, case.optimizer)
    return ZeroRedundancyOptimizer(model.parameters(), make, **case.kwargs, **kwargs)


def _scenarios() -> list[Scenario]:
    both = (2, 4)
    view = partial(the_same_as_in_one_process, ddp_bucket_view, CASES[0])
    found = [
        Scenario("ddp_bucket_view", view, both),
        Scenario("zero_bucket_view", partial(zero, CASES[0], parameters_as_bucket_view=True), both),
    ]
    for case in CASES:
        for parallelism, sizes in PARALLELISMS.items():
            run = partial(the_same_as_in_one_process, parallelism, case)
            found.append(Scenario(f"{parallelism.__name__}-{case.name}", run, sizes))
        for parallelism in [each for each in (fsdp, tp) if each in PARALLELISMS]:
            name = f"missing_gradients-{parallelism.__name__}-{case.name}"
            found.append(Scenario(name, partial(missing_gradients, parallelism, case), (2,)))
        for make in (zero, zero_with_nothing_to_do, zero_from_a_checkpoint):
            found.append(Scenario(f"{make.__name__}-{case.name}", partial(make, case), both))
    return [*found, *clipping_scenarios(CASES), *checkpoint_scenarios(CASES), *storage_scenarios()]


SCENARIOS = _scenarios()


def main() -> None:
    speed_up()
    backend, *sizes = sys.argv[1:]
    for name in PRELOAD:
        with suppress(ModuleNotFoundError):  # Triton before 3.4 has no Gluon
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        found = outcomes(SCENARIOS, backend, tuple(map(int, sizes)), Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
