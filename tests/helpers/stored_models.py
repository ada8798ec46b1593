"""A small model, its parameters stored in formats of their own, in the ways to shard it.

Another one, of which every element is its own index, shows what a process has of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cases import TORCH
from parallel_models import local
from process_groups import World
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Linear, Module, Parameter

from triton_optim import SGD, AdamW

BFLOAT16 = torch.bfloat16
FORMATS: dict[str, Callable[..., Any]] = {
    "stochastic": partial(
        SGD, lr=0.01, momentum=0.9, stochastic_rounding=True, rounding_seed=3, max_grad_norm=1.0
    ),
    "exact": partial(AdamW, master_weight_bits=32, state_dtype={"exp_avg": torch.float16}),
}
EIGHT_BITS = partial(AdamW, master_weight_bits=32, state_dtype="8bit")


class Layers(Module):
    """Shards begin at multiples of 8 elements and elsewhere; some processes have no `scale`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.wide = Linear(5, 7), Linear(7, 6), Linear(32, 3, bias=False)
        self.kernel = Parameter(torch.randn(3, 5, 2))
        self.scale = Parameter(torch.ones(1))
        self.to(BFLOAT16)

    def forward(self) -> None:
        raise NotImplementedError  # gradients are set by hand, so that no sum differs


def indices() -> Layers:
    model = Layers().double()
    for param in model.parameters():
        param.data = torch.arange(param.numel(), dtype=torch.float64).view(param.shape)
    return model


def in_one(world: World, model: Layers) -> Module:
    return model.to(world.device)


def fsdp(world: World, model: Layers) -> Module:
    mesh = init_device_mesh(world.device.type, (world.size,))
    model.to(world.device)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def hsdp(world: World, model: Layers) -> Module:
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("copy", "shard"))
    fully_shard(model.to(world.device), mesh=mesh)
    return model


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel(), "wide": RowwiseParallel()}


def tp(world: World, model: Layers) -> Module:
    mesh = init_device_mesh(world.device.type, (world.size,))
    return parallelize_module(model.to(world.device), mesh, PLAN)


def fsdp_tp(world: World, model: Layers) -> Module:
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model.to(world.device), mesh["tp"], PLAN)
    fully_shard(model, mesh=mesh["dp"])
    return model


def columns(world: World, model: Layers) -> Module:
    """Shards of the second dim, and copies of what has none."""

    def distribute(_: str, module: Module, mesh: Any) -> None:
        for name, param in [*module.named_parameters(recurse=False)]:
            placements = [Shard(1) if param.ndim > 1 else Replicate()]
            shard = distribute_tensor(param.detach(), mesh, placements)
            module.register_parameter(name, Parameter(shard))

    mesh = init_device_mesh(world.device.type, (world.size,))
    return distribute_module(model.to(world.device), mesh, distribute)


Parallelism = Callable[[World, Layers], Module]
PARALLELISMS: dict[Parallelism, tuple[int, ...]] = {fsdp: (2, 4), hsdp: (4,)}
if TORCH >= (2, 11):  # before, uneven shards of columns are strided views, which no kernel takes
    PARALLELISMS |= {tp: (2, 4), fsdp_tp: (4,), columns: (2, 4)}


class Problem:
    """A model in some form, its optimizer, and the indices of what this process has of it."""

    def __init__(self, parallelism: Parallelism, world: World, name: str) -> None:
        self.model = parallelism(world, Layers())
        make = EIGHT_BITS if name == "8bit" else FORMATS[name]
        self.optimizer = make(self.model.parameters())
        where = parallelism(world, indices())
        self.where = {n: local(p).long() for n, p in where.named_parameters()}

    def train(self, steps: Sequence[int]) -> None:
        """With gradients whose sums of squares are exact in any order; now and then one misses."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for i, (name, param) in enumerate(self.model.named_parameters()):
                whole = torch.randint(-8, 9, param.shape, generator=generator) / 8
                grad = whole.flatten().to(param.device, BFLOAT16)[self.where[name]]
                if isinstance(param, DTensor):
                    grad = DTensor.from_local(
                        grad, param.device_mesh, param.placements, run_check=False,
                        shape=param.shape, stride=param.stride(),
                    )  # fmt: skip
                param.grad = None if step % 3 == 1 and i % 2 else grad
            self.optimizer.step()

    def values(self) -> dict[str, dict[str, Tensor]]:
        """Of every parameter, what this process has of it and of its state."""
        return {
            name: {
                "param": local(param),
                **{key: local(v).clone() for key, v in self.optimizer.state[param].items()},
            }
            for name, param in self.model.named_parameters()
        }

    def mine(self, whole: dict[str, Any]) -> dict[str, Any]:
        """What this process has of the values of a model in one process."""
        return {
            name: {
                k: v if k == "step" else v.flatten()[self.where[name]] for k, v in values.items()
            }
            for name, values in whole.items()
        }
