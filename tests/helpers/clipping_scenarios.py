"""Clipping by a norm over all processes, for `distributed_scenarios.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from cases import Case
from parallel_models import (
    SHARDED,
    Parallelism,
    assert_equal,
    assert_kernels,
    backward,
    fsdp,
    full,
    full_values,
    local,
    one_process,
    train,
)
from process_groups import Scenario, World
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

import triton_optim

MAX_NORM = 1.5  # steps that descend start above, and come below


def clipped_in_the_step(parallelism: Parallelism, case: Case, world: World) -> None:
    """`max_grad_norm=`, and the norm of each step in `grad_norm`."""
    parallel = parallelism(world)
    optimizer = case.ours(parallel.model.parameters(), max_grad_norm=MAX_NORM)
    norms, updated = [], []
    for step in range(3):
        updated += train(parallel, optimizer, [step])
        norm = optimizer.grad_norm
        assert type(norm) is Tensor
        assert (norm.shape, norm.device) == ((), world.device)
        norms.append(norm.clone())
    model, expected, expected_norms = _clipped_in_one_process(case, world)
    assert_equal(norms, expected_norms)
    assert_equal(full_values(parallel.model, optimizer), full_values(model, expected))
    assert_kernels(optimizer, updated)


def clipped_before_the_step(parallelism: Parallelism, case: Case, world: World) -> None:
    """`clip_grad_norm_`, which leaves the clipped gradients."""
    parallel = parallelism(world)
    optimizer = case.ours(parallel.model.parameters())
    norms: list[Tensor] = []

    def clip() -> None:
        params = parallel.model.parameters()
        norms.append(triton_optim.clip_grad_norm_(params, MAX_NORM))

    updated = train(parallel, optimizer, clip=clip)
    model, expected, expected_norms = _clipped_in_one_process(case, world)
    assert_equal(list(map(full, norms)), expected_norms)
    assert_equal(_gradients(parallel.model), _gradients(model))
    assert_equal(full_values(parallel.model, optimizer), full_values(model, expected))
    assert_kernels(optimizer, updated)


def _clipped_in_one_process(case: Case, world: World) -> tuple[Module, Optimizer, list[Tensor]]:
    whole = one_process(world)
    optimizer = case.theirs(whole.model.parameters())
    norms: list[Tensor] = []

    def clip() -> None:
        params = whole.model.parameters()
        norms.append(torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=False))

    train(whole, optimizer, clip=clip)
    assert max(norms) > MAX_NORM
    assert min(norms) < MAX_NORM or case.kwargs.get("maximize")
    return whole.model, optimizer, norms


def _gradients(model: Module) -> list[Tensor]:
    return [full(param.grad) for param in model.parameters() if param.grad is not None]


def one_process_has_an_infinity(world: World) -> None:
    """All of them raise, and no gradient is changed."""
    parallel = fsdp(world)
    backward(parallel, 0)
    params = list(parallel.model.parameters())
    gradients = [local(param.grad) for param in params if param.grad is not None]
    if world.rank == 0:
        gradients[1][0] = math.inf
    before = [gradient.clone() for gradient in gradients]
    try:
        triton_optim.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        assert "non-finite" in str(error)
    else:
        raise AssertionError("nothing was raised")
    assert all(map(torch.equal, gradients, before))


def most_processes_have_nothing(case: Case, world: World) -> None:
    """One process has the whole parameter; the others only take part in its norm."""
    parallel, whole = fsdp(world), one_process(world)
    params = [model.get_parameter("scale") for model, _ in (parallel, whole)]
    limit, norms = 0.01, []
    optimizer = case.ours(params[:1], max_grad_norm=limit)
    updated = train(parallel, optimizer)
    clip = partial(torch.nn.utils.clip_grad_norm_, params[1:], limit, foreach=False)
    train(whole, case.theirs(params[1:]), clip=lambda: norms.append(clip()))
    assert min(norms) > limit
    assert_equal([optimizer.grad_norm, full(params[0])], [norms[-1], params[1].detach()])
    assert_kernels(optimizer, updated)


def clipping_scenarios(cases: Sequence[Case]) -> list[Scenario]:
    infinity = "clip_grad_norm_-one_process_has_an_infinity"
    nothing = partial(most_processes_have_nothing, cases[0])
    found = [
        Scenario(infinity, one_process_has_an_infinity, (2, 4)),
        Scenario("max_grad_norm-most_processes_have_nothing", nothing, (2, 4)),
    ]
    for parallelism, sizes in SHARDED.items():
        for case in cases if parallelism is fsdp else cases[:1]:
            name = f"max_grad_norm-{parallelism.__name__}-{case.name}"
            found.append(Scenario(name, partial(clipped_in_the_step, parallelism, case), sizes))
        run = partial(clipped_before_the_step, parallelism, cases[0])
        found.append(Scenario(f"clip_grad_norm_-{parallelism.__name__}", run, sizes))
    return found
