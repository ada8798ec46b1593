"""Small parameters, plain ones or DTensors, and their gradients."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from lab.host_rows import DTENSOR
from triton_optim.tensors.sharding import is_dtensor, local, spec_of

SHAPE = (4, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, for the mesh of DTensors."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def parameters(n: int, kind: str) -> list[Parameter]:
    """Plain ones, or DTensors as `fully_shard` makes them: each has a spec of its own."""
    shards = [torch.randn(SHAPE, device=DEVICE) for _ in range(n)]
    if kind == DTENSOR:
        mesh = init_device_mesh(DEVICE, (1,))
        return [Parameter(DTensor.from_local(shard, mesh, [Shard(0)])) for shard in shards]
    return [*map(Parameter, shards)]


def new_gradients(params: Sequence[Parameter], chosen: Sequence[Parameter]) -> None:
    """Give those that are chosen a new gradient of a backward pass, and the others none.

    A DTensor's gradient shares the parameter's spec, as those of `fully_shard` do.
    """
    for param in params:
        param.grad = None
    shards = [local(param).detach().requires_grad_() for param in chosen]
    loss = torch.stack([(shard * 2).sum() for shard in shards]).sum()
    for param, grad in zip(chosen, torch.autograd.grad(loss, shards), strict=True):
        # The arguments that torch itself gives in FSDP2; the stub has those of Tensor.
        sharded = is_dtensor(param)
        param.grad = DTensor(grad, spec_of(param), requires_grad=False) if sharded else grad
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def half(params: Sequence[Parameter], random_: random.Random) -> list[Parameter]:
    """A random half, in their order."""
    indices = random_.sample(range(len(params)), len(params) // 2)
    return [params[i] for i in sorted(indices)]


def reading_addresses(params: Sequence[Parameter], kind: str) -> Callable[[], object]:
    """The least that a step can do: read where every gradient lies."""
    given: Any = params
    if kind == DTENSOR:
        return lambda: [g._local_tensor.data_ptr() for p in given if (g := p.grad) is not None]
    return lambda: [g.data_ptr() for p in given if (g := p.grad) is not None]
