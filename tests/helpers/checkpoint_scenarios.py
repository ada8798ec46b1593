"""Checkpoints of torch.distributed.checkpoint, for `distributed_scenarios.py`.

Training goes on from one world to the next, in as many processes as that one has.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from cases import Case
from parallel_models import (
    SHARDED,
    Parallelism,
    ParallelModel,
    assert_equal,
    assert_kernels,
    fsdp,
    full_values,
    in_one_process,
    local,
    one_process,
    train,
)
from process_groups import Scenario, World
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

STEPS = 2  # in each world


def resharded(case: Case, turns: str, world: World) -> None:
    """Load what the world before saved, train, compare, save.

    Args:
        case: the optimizer.
        turns: whose class steps, in one world after another: (o)urs or (t)orch's.
        world: this one.
    """
    turn = world.sizes.index(world.size)
    parallel = one_process(world) if world.size == 1 else fsdp(world)
    ours = turns[turn % len(turns)] == "o"
    optimizer = (case.ours if ours else case.theirs)(parallel.model.parameters())
    path = f"{world.folder}/{case.name}-{turns}-{{}}"
    if turn:
        _load(path.format(turn - 1), parallel, optimizer)
    updated = train(parallel, optimizer, range(turn * STEPS, (turn + 1) * STEPS))
    expected = in_one_process(case, world, (turn + 1) * STEPS)
    values = full_values(parallel.model, optimizer)
    save(_state(parallel, optimizer), checkpoint_id=path.format(turn))
    assert_equal(values, full_values(*expected))
    if ours:
        assert_kernels(optimizer, updated)


def _state(parallel: ParallelModel, optimizer: Optimizer) -> dict[str, Any]:
    model, state = get_state_dict(parallel.model, optimizer)
    return {"model": model, "optimizer": state}


def _load(path: str, parallel: ParallelModel, optimizer: Optimizer) -> None:
    state = _state(parallel, optimizer)
    load(state, checkpoint_id=path)
    _set(state, parallel, optimizer)


def _set(state: dict[str, Any], parallel: ParallelModel, optimizer: Optimizer) -> None:
    set_state_dict(
        parallel.model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def back_to_a_checkpoint(case: Case, world: World) -> None:
    """Loaded by an optimizer that has stepped, into parameters that moved meanwhile."""
    parallel = fsdp(world)
    optimizer = case.ours(parallel.model.parameters())
    train(parallel, optimizer, range(2))
    state = copy.deepcopy(_state(parallel, optimizer))
    train(parallel, optimizer, [7])
    before = [local(param).data_ptr() for param in parallel.model.parameters()]
    parallel.model._apply(torch.clone)  # as `to()` does it, from a device and back
    assert before != [local(param).data_ptr() for param in parallel.model.parameters()]
    _set(state, parallel, optimizer)
    updated = train(parallel, optimizer, [2])
    assert_equal(full_values(parallel.model, optimizer), full_values(*in_one_process(case, world)))
    assert_kernels(optimizer, updated)


def state_dict_is_torchs(parallelism: Parallelism, case: Case, world: World) -> None:
    """The same names, and tensors of the same placements."""
    described = []
    for make in (case.ours, case.theirs):
        parallel = parallelism(world)
        optimizer = make(parallel.model.parameters())
        train(parallel, optimizer, [0])
        described.append(_described(get_optimizer_state_dict(parallel.model, optimizer)))
        described.append(_described(optimizer.state_dict()))
    ours, ours_plain, theirs, theirs_plain = described
    assert ours == theirs, f"{ours} is not {theirs}"
    assert ours_plain == theirs_plain, f"{ours_plain} is not {theirs_plain}"


def _described(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _described(value[key]) for key in value}
    if isinstance(value, list):
        return [_described(item) for item in value]
    if isinstance(value, DTensor):
        mesh, tensor = value.device_mesh.mesh.tolist(), value.to_local()
        # torch 2.15's first momentum is the gradient as it came, be it a partial sum
        placements = tuple(Replicate() if p.is_partial() else p for p in value.placements)
        return [mesh, placements, value.shape, value.stride(), _described(tensor)]
    if isinstance(value, Tensor):
        return [type(value), value.dtype, value.shape, value.stride(), value.device]
    return None  # hyperparameters: `foreach` differs


def checkpoint_scenarios(cases: Sequence[Case]) -> list[Scenario]:
    found = []
    for case in cases:
        for turns in ("o", "to"):
            run = partial(resharded, case, turns)
            found.append(Scenario(f"resharded_{turns}-{case.name}", run, (2, 4, 1)))
        run = partial(back_to_a_checkpoint, case)
        found.append(Scenario(f"back_to_a_checkpoint-{case.name}", run, (2, 4)))
        for parallelism, sizes in SHARDED.items():
            name = f"state_dict-{parallelism.__name__}-{case.name}"
            found.append(Scenario(name, partial(state_dict_is_torchs, parallelism, case), sizes))
    return found
