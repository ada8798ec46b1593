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
from parallel import (
    SHARDED,
    Spread,
    Way,
    assert_equal,
    assert_kernels,
    fsdp,
    full_values,
    in_one_process,
    local,
    one_process,
    train,
)
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
from worlds import Scenario, World

STEPS = 2  # in each world


def resharded(case: Case, turns: str, world: World) -> None:
    """Load what the world before saved, train, compare, save.

    Args:
        case: the optimizer.
        turns: whose class steps, in one world after another: (o)urs or (t)orch's.
        world: this one.
    """
    turn = world.sizes.index(world.size)
    spread = one_process(world) if world.size == 1 else fsdp(world)
    ours = turns[turn % len(turns)] == "o"
    optimizer = (case.ours if ours else case.theirs)(spread.model.parameters())
    path = f"{world.folder}/{case.name}-{turns}-{{}}"
    if turn:
        _load(path.format(turn - 1), spread, optimizer)
    updated = train(spread, optimizer, range(turn * STEPS, (turn + 1) * STEPS))
    expected = in_one_process(case, world, (turn + 1) * STEPS)
    values = full_values(spread.model, optimizer)
    save(_state(spread, optimizer), checkpoint_id=path.format(turn))
    assert_equal(values, full_values(*expected))
    if ours:
        assert_kernels(optimizer, updated)


def _state(spread: Spread, optimizer: Optimizer) -> dict[str, Any]:
    model, state = get_state_dict(spread.model, optimizer)
    return {"model": model, "optimizer": state}


def _load(path: str, spread: Spread, optimizer: Optimizer) -> None:
    state = _state(spread, optimizer)
    load(state, checkpoint_id=path)
    _set(state, spread, optimizer)


def _set(state: dict[str, Any], spread: Spread, optimizer: Optimizer) -> None:
    set_state_dict(
        spread.model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def back_to_a_checkpoint(case: Case, world: World) -> None:
    """Loaded by an optimizer that has stepped, into parameters that moved meanwhile."""
    spread = fsdp(world)
    optimizer = case.ours(spread.model.parameters())
    train(spread, optimizer, range(2))
    state = copy.deepcopy(_state(spread, optimizer))
    train(spread, optimizer, [7])
    before = [local(param).data_ptr() for param in spread.model.parameters()]
    spread.model._apply(torch.clone)  # as `to()` does it, from a device and back
    assert before != [local(param).data_ptr() for param in spread.model.parameters()]
    _set(state, spread, optimizer)
    updated = train(spread, optimizer, [2])
    assert_equal(full_values(spread.model, optimizer), full_values(*in_one_process(case, world)))
    assert_kernels(optimizer, updated)


def state_dict_is_torchs(way: Way, case: Case, world: World) -> None:
    """The same names, and tensors spread in the same way."""
    described = []
    for make in (case.ours, case.theirs):
        spread = way(world)
        optimizer = make(spread.model.parameters())
        train(spread, optimizer, [0])
        described.append(_described(get_optimizer_state_dict(spread.model, optimizer)))
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
        for way, sizes in SHARDED.items():
            name = f"state_dict-{way.__name__}-{case.name}"
            found.append(Scenario(name, partial(state_dict_is_torchs, way, case), sizes))
    return found
