"""A small model, the ways to train it in several processes, and what it becomes in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from cases import TORCH, Case
from process_groups import World
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import LayerNorm, Linear, Module, Parameter, Sequential, Tanh
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from triton_optim.kernels.chunks import PARAM
from triton_optim.launch.launcher import UpdateLaunch, record_launches

ROWS = 4  # of a batch, shared out evenly among 1, 2 or 4 processes
POSITIONS = 5  # of a sequence


class Net(Module):
    """Sizes that nothing divides. With four processes, one has none of `head`, three of `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Sequential(Linear(5, 7), Tanh())
        self.down = Linear(7, 6)
        self.norm = LayerNorm(6, bias=False)
        self.head = Linear(6, 3, bias=False)
        self.scale = Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.norm(self.down(self.up(x))))
        return x * self.scale


def new_net(device: torch.device) -> Net:
    """The same in every process."""
    torch.manual_seed(0)
    return Net().to(device, torch.float64)


class ParallelModel(NamedTuple):
    """A model that a world trains, and this process's rows of every batch."""

    model: Module
    rows: slice


def _rows(part: int, parts: int) -> slice:
    return slice(part * ROWS // parts, (part + 1) * ROWS // parts)


def one_process(world: World) -> ParallelModel:
    return ParallelModel(new_net(world.device), slice(None))


def ddp(world: World) -> ParallelModel:
    model = DistributedDataParallel(new_net(world.device))
    return ParallelModel(model, _rows(world.rank, world.size))


def ddp_bucket_view(world: World) -> ParallelModel:
    """Gradients lie side by side in one buffer."""
    model = DistributedDataParallel(new_net(world.device), gradient_as_bucket_view=True)
    return ParallelModel(model, _rows(world.rank, world.size))


def fsdp(world: World) -> ParallelModel:
    mesh = init_device_mesh(world.device.type, (world.size,))
    return ParallelModel(_sharded(new_net(world.device), mesh), _rows(world.rank, world.size))


def hsdp(world: World) -> ParallelModel:
    """Shards, and copies of them."""
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("copy", "shard"))
    return ParallelModel(_sharded(new_net(world.device), mesh), _rows(world.rank, world.size))


def tp(world: World) -> ParallelModel:
    """`norm` is whole everywhere, each process sees a part of the sequence; `scale` is plain."""
    return _tp(world, shard_head=world.size == 2)


def tp_few_rows(world: World) -> ParallelModel:
    """Shards of 1, 1, 1 and 0 rows: torch gives every process the whole gradient."""
    return _tp(world, shard_head=True)


def _tp(world: World, *, shard_head: bool) -> ParallelModel:
    mesh = init_device_mesh(world.device.type, (world.size,))
    model = _tensor_parallel(new_net(world.device), mesh, shard_head=shard_head)
    return ParallelModel(model, slice(None))


def fsdp_tp(world: World) -> ParallelModel:
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    model = _tensor_parallel(new_net(world.device), mesh["tp"], shard_head=True)
    return ParallelModel(_sharded(model, mesh["dp"]), _rows(mesh.get_local_rank("dp"), 2))


def _sharded(model: Net, mesh: DeviceMesh) -> Net:
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _tensor_parallel(model: Net, mesh: DeviceMesh, *, shard_head: bool) -> Net:
    # Local outputs would have to be equally large in all processes.
    plan = {
        "up.0": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        if shard_head
        else PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
    }
    parallelize_module(model, mesh, plan)
    return model


Parallelism = Callable[[World], ParallelModel]
# With the sizes of the worlds that each makes sense in.
SHARDED: dict[Parallelism, tuple[int, ...]] = {fsdp: (2, 4), hsdp: (4,)}
PARALLELISMS = {ddp: (2, 4), **SHARDED}
if TORCH >= (2, 13):  # in 2.11 the backward of these models fails in torch
    SHARDED |= {tp: (2, 4), fsdp_tp: (4,)}
    PARALLELISMS |= {tp: (2, 4), fsdp_tp: (4,), tp_few_rows: (4,)}


def backward(parallel: ParallelModel, step: int) -> None:
    """Leave the gradients of one step's loss."""
    parallel.model.zero_grad()
    device = next(parallel.model.parameters()).device
    generator = torch.Generator().manual_seed(step)
    data = torch.randn(ROWS, POSITIONS, 5 + 3, generator=generator, dtype=torch.float64)
    x, y = data.to(device)[parallel.rows].split((5, 3), dim=-1)
    mse_loss(parallel.model(x), y).backward()


def train(
    parallel: ParallelModel,
    optimizer: Optimizer,
    steps: Sequence[int] = range(3),
    clip: Callable[[], object] = lambda: None,
) -> list[set[int]]:
    """Train, with `clip` between backward and step.

    Returns:
        Step by step, the addresses of the parameters that kernels updated.
    """
    updated = []
    for step in steps:
        backward(parallel, step)
        clip()
        with record_launches() as launches:
            optimizer.step()
        updated.append(
            set(
                chain.from_iterable(
                    _addresses(launch) for launch in launches if isinstance(launch, UpdateLaunch)
                )
            )
        )
    return updated


def _addresses(launch: UpdateLaunch) -> list[int]:
    rows = launch.spec.block_to_tensor.unique().long()
    addresses: list[int] = launch.tables.rows[rows, PARAM.value].tolist()
    return addresses


def in_one_process(case: Case, world: World, steps: int = 3) -> tuple[Module, Optimizer]:
    """The model and torch's for-loop after as many steps with whole batches."""
    whole = one_process(world)
    optimizer = case.theirs(whole.model.parameters())
    train(whole, optimizer, range(steps))
    return whole.model, optimizer


def full(tensor: Tensor) -> Tensor:
    """All of a tensor; every process of its mesh must ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_values(model: Module, optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Every parameter's value and state, in whole."""
    values = []
    for param in model.parameters():
        state = optimizer.state.get(param, {})
        tensors = {name: full(value) for name, value in state.items() if value is not None}
        values.append({"param": full(param), **tensors})
    return values


def assert_equal(ours: Any, theirs: Any, **kwargs: Any) -> None:
    """Nested values, equal but for what another order of summation changes in float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, **kwargs)


def assert_kernels(optimizer: Any, updated: Sequence[set[int]]) -> None:
    """Every step that `train` made went through the kernels, all of it, on what is local.

    Args:
        optimizer: one of this package.
        updated: what `train` returned.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert optimizer._stepper.plan is not None
    rest = len(optimizer._stepper.plan.fallback(optimizer._fused_view()))
    assert not rest, f"{rest} of {len(params)} parameters fell back"
    shards = {local(param).data_ptr() for param in params if local(param).numel()}
    assert all(addresses == shards for addresses in updated)
