"""Storage formats in several processes, for `distributed_scenarios.py`: the same bits as in one."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from assertions import assert_same_bits
from parallel_models import local
from process_groups import Scenario, World
from stored_models import (
    BFLOAT16,
    FORMATS,
    PARALLELISMS,
    Layers,
    Parallelism,
    Problem,
    fsdp,
    in_one,
)
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Linear, Module, Parameter, Sequential
from torch.nn.parallel import DistributedDataParallel

import triton_optim
from triton_optim import AdamW, fp32_state_dict, load_fp32_state_dict
from triton_optim.tensors.sharding import global_index

STEPS = 2  # in each world that goes on from a checkpoint


@cache
def in_one_process(world: World, name: str, steps: int) -> Problem:
    problem = Problem(in_one, world, name)
    problem.train(range(steps))
    return problem


def the_same_bits(parallelism: Parallelism, name: str, world: World) -> None:
    problem = Problem(parallelism, world, name)
    _check_indices(problem.model, problem.where)
    steps = 2 if parallelism is fsdp else 1
    problem.train(range(steps))
    expected = in_one_process(world, name, steps)
    assert_same_bits(problem.values(), problem.mine(expected.values()))
    if name == "exact":
        _check_float32_weights(parallelism, problem, expected, world)


def _check_indices(model: Module, where: dict[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        assert torch.equal(_indices(param), where[name].flatten().cpu()), name


def _indices(param: Tensor) -> Tensor:
    index, i = global_index(param, ""), torch.arange(local(param).numel())
    return index.offset + i // index.columns * index.pitch + i % index.columns


def transposed_rows(world: World) -> None:
    """Of 2, 2, 1 and 0 rows: a single one does not show in which order they lie."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    whole = torch.arange(30, device=world.device).view(6, 5).t()
    rows = whole[2 * world.rank : 2 * world.rank + 2].t().contiguous().t()
    param = DTensor.from_local(
        rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    assert torch.equal(_indices(param), rows.t().flatten().cpu())


def _check_float32_weights(
    parallelism: Parallelism, problem: Problem, expected: Problem, world: World
) -> None:
    """Given as shards, and loaded into another model before its first step and after."""
    weights = fp32_state_dict(problem.model, problem.optimizer)
    whole = fp32_state_dict(expected.model, expected.optimizer)
    mine = {name: whole[name].flatten()[problem.where[name]] for name in weights}
    assert_same_bits({name: local(value) for name, value in weights.items()}, mine)
    other = Problem(parallelism, world, "exact")
    for steps in range(2 if parallelism is fsdp else 1):
        other.train(range(steps))
        load_fp32_state_dict(other.model, other.optimizer, weights)
        again = fp32_state_dict(other.model, other.optimizer)
        assert_same_bits({name: local(value) for name, value in again.items()}, mine)


def shards_of_two_dims(world: World) -> None:
    """Beside the first one: refused, and nothing is written."""
    mesh = init_device_mesh(world.device.type, (2, 2))
    whole = torch.ones(2, 4, 6, dtype=BFLOAT16, device=world.device)
    placements = ([Shard(0), Shard(2)], [Shard(1), Shard(2)])
    params = [Parameter(distribute_tensor(whole, mesh, each)) for each in placements]
    for param in params:
        param.grad = torch.ones_like(param)
    try:
        AdamW(params, stochastic_rounding=True).step()
    except RuntimeError as error:
        assert "parameter 1 of group 0 is (2, 4, 6) and placed as" in str(error), error
    else:
        raise AssertionError("nothing was raised")
    assert all((local(param) == 1).all() for param in params)
    AdamW(params, master_weight_bits=32).step()  # rounds nothing
    few = distribute_tensor(whole[:, :1], mesh, placements[1])  # some have all of the second dim
    assert global_index(few, "").pitch == 6 or not local(few).numel()


def resharded(name: str, world: World) -> None:
    """Load what the world before saved, train, compare to the bit, save."""
    turn = world.sizes.index(world.size)
    problem = Problem(in_one if world.size == 1 else fsdp, world, name)
    path = f"{world.folder}/stored-{name}-{{}}"
    if turn:
        _load(path.format(turn - 1), problem)
    problem.train(range(turn * STEPS, (turn + 1) * STEPS))
    expected = in_one_process(world, name, (turn + 1) * STEPS)
    assert_same_bits(problem.values(), problem.mine(expected.values()))
    save(_state(problem), checkpoint_id=path.format(turn))


def eight_bits_resharded(world: World) -> None:
    """To the bit into the same world; into another one, groups are others, within a unit."""
    turn = world.sizes.index(world.size)
    parallelism, path = in_one if world.size == 1 else fsdp, f"{world.folder}/stored-8bit-{{}}"
    problem = Problem(parallelism, world, "8bit")
    if turn:
        _load(path.format(turn - 1), problem)
        expected = torch.load(f"{path.format(turn - 1)}-values.pt")
        for name, values in _whole(problem).items():
            error = (values - expected[name]).abs()
            largest = expected[name].abs().max()
            assert (error <= expected[name].abs() / 15 + largest * 2**-13).all(), name
    problem.train(range(turn * STEPS, (turn + 1) * STEPS))
    save(_state(problem), checkpoint_id=path.format(turn))
    whole = _whole(problem)
    if world.rank == 0:
        torch.save(whole, f"{path.format(turn)}-values.pt")
    again = Problem(parallelism, world, "8bit")
    _load(path.format(turn), again)
    for each in (problem, again):
        each.train([90, 91])
    assert_same_bits(again.optimizer.state_dict(), problem.optimizer.state_dict())
    assert_same_bits(*([local(p) for p in x.model.parameters()] for x in (again, problem)))


def _whole(problem: Problem) -> dict[str, Tensor]:
    """The averages of all ranks."""
    state: Any = get_state_dict(problem.model, problem.optimizer)[1]
    return {
        f"{name}.{key}": (value.full_tensor() if isinstance(value, DTensor) else value).float()
        for name, entry in state["state"].items()
        for key, value in entry.items()
        if key in ("exp_avg", "exp_avg_sq")
    }


def _state(problem: Problem) -> dict[str, Any]:
    model, optimizer = get_state_dict(problem.model, problem.optimizer)
    return {"model": model, "optimizer": optimizer}


def _load(path: str, problem: Problem) -> None:
    before = [local(param).clone() for param in problem.model.parameters()]
    state = _state(problem)  # which steps with zeros to make it
    assert_same_bits([local(param) for param in problem.model.parameters()], before)
    load(state, checkpoint_id=path)
    set_state_dict(
        problem.model, problem.optimizer,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip


def from_float32(world: World) -> None:
    """A checkpoint of an optimizer without formats: values and state, which has no remainder."""
    exact = fsdp(world, Layers().float())
    optimizer = AdamW(exact.parameters())
    for param in exact.parameters():
        param.grad = torch.full_like(param, 0.3)
    optimizer.step()
    model_state, optimizer_state = get_state_dict(exact, optimizer)
    path = f"{world.folder}/float32"
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)

    problem = Problem(fsdp, world, "exact")
    state = get_optimizer_state_dict(problem.model, problem.optimizer)
    weights = fp32_state_dict(problem.model, problem.optimizer)
    partly = DefaultLoadPlanner(allow_partial_load=True)
    load({"model": weights, "optimizer": state}, checkpoint_id=path, planner=partly)
    set_optimizer_state_dict(problem.model, problem.optimizer, state)
    load_fp32_state_dict(problem.model, problem.optimizer, weights)
    loaded = fp32_state_dict(problem.model, problem.optimizer)
    for (name, param), ours in zip(
        exact.named_parameters(), problem.model.parameters(), strict=True
    ):
        assert_same_bits(local(loaded[name]), local(param))
        for key, value in optimizer.state[param].items():
            state_of = problem.optimizer.state[ours]
            assert_same_bits(local(state_of[key]), local(value).to(state_of[key].dtype))
    problem.train([0])


def zero(name: str, options: dict[str, Any], world: World) -> None:
    """Each process has the remainders of its own parameters; with four, two have none."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # with warnings, errors in pytest

    results = []
    cls = getattr(triton_optim, name)
    for make in (cls, partial(ZeroRedundancyOptimizer, optimizer_class=cls)):
        model = Layers().to(world.device)
        optimizer = make([*model.down.parameters()], lr=1e-4, master_weight_bits=32, **options)
        for value in (0.1, 0.3):
            for param in model.down.parameters():
                param.grad = torch.full_like(param, value)
            optimizer.step()
        held = getattr(optimizer, "optim", optimizer).state
        results.append((model.state_dict(), {n: held.get(p) for n, p in model.named_parameters()}))
    (expected, all_held), (got, held) = results
    assert_same_bits(got, expected)
    mine = {name: state for name, state in held.items() if state is not None}
    assert_same_bits(mine, {name: all_held[name] for name in mine})
    assert len(mine) == {2: 1, 4: int(world.rank < 2)}[world.size]


def replicas(name: str, world: World) -> None:
    """Under DistributedDataParallel all processes keep the same bits, remainders and state too."""
    torch.manual_seed(0)
    model = Sequential(Linear(5, 7), Linear(7, 6)).to(world.device, BFLOAT16)
    wrapped = DistributedDataParallel(model)
    optimizer = FORMATS[name](wrapped.parameters())
    for step in range(3):
        x = torch.full((2, 5), 0.1 * (world.rank + step), dtype=BFLOAT16, device=world.device)
        wrapped(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    all_of_them: list[Any] = [None] * world.size
    dist.all_gather_object(all_of_them, mine)
    for other in all_of_them:
        assert_same_bits(other, mine)


DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}


def storage_scenarios() -> list[Scenario]:
    found = [
        Scenario("shards_of_two_dims", shards_of_two_dims, (4,)),
        Scenario("transposed_rows", transposed_rows, (4,)),
        Scenario("stored-from_float32", from_float32, (2,)),
        Scenario("stored-zero", partial(zero, "AdamW", {}), (2, 4)),
        # options of the whole optimizer, which ZeroRedundancyOptimizer puts into groups
        Scenario("stored-zero-decoupled", partial(zero, "RMSprop", DECOUPLED), (2,)),
        Scenario("stored_resharded-8bit", eight_bits_resharded, (2, 4, 1)),
    ]
    for name in FORMATS:
        found.append(Scenario(f"stored-replicas-{name}", partial(replicas, name), (2,)))
        found.append(Scenario(f"stored_resharded-{name}", partial(resharded, name), (2, 4, 1)))
        for parallelism, sizes in PARALLELISMS.items():
            run = partial(the_same_bits, parallelism, name)
            found.append(Scenario(f"stored-{parallelism.__name__}-{name}", run, sizes))
    return found
