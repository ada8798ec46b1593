"""What is computed of many ranks: shards as torch cuts them, launches as the optimizer makes them.

All numbers of host time here are made up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cases import DEVICE
from lab import host_tensors, scaling, suites
from lab.host_rows import Row
from lab.suites import Layout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import UpdateLaunch, record_launches

ROWS = [
    Row("made-up", "rmsprop", "dtensor", n, 1, "fresh", "triton_optim", 5, us * n, 1.0, 1.0)
    for n, us in ((20_000, 2.0), (10, 20.0))
]


@pytest.fixture
def one_process() -> Iterator[None]:
    with host_tensors.one_process():
        yield


ALIGNED = Layout("aligned", [("0.a", (8, 4)), ("0.b", (8,)), ("1.a", (16,)), ("head", (8, 4))])
MISALIGNED = Layout("misaligned", [("0.a", (8, 4)), ("0.b", (6,)), ("0.c", (8,)), ("1.a", (5,))])


def _gradients(layout: Layout, ranks: int) -> list[torch.Tensor]:
    """Rank 0's: a layer's lie side by side in one tensor, as FSDP2's reduce-scatter leaves them."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for name, shape in suites.shard(layout, ranks).tensors:
        sizes[name.split(".")[0]].append(math.prod(shape))
    return [
        part
        for unit in sizes.values()
        for part in torch.randn(sum(unit), device=DEVICE).split(unit)
    ]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("layout", [ALIGNED, MISALIGNED], ids=lambda layout: layout.name)
def test_launches_and_all_reduces_are_those_of_the_optimizer(layout: Layout, ranks: int) -> None:
    params, mesh = [], init_device_mesh(DEVICE, (1,))
    for grad in _gradients(layout, ranks):
        shard = torch.randn(grad.shape, device=DEVICE)
        params.append(Parameter(DTensor.from_local(shard, mesh, [Shard(0)])))
        params[-1].grad = DTensor.from_local(grad, mesh, [Shard(0)])
    optimizer = triton_optim.RMSprop(params, max_grad_norm=1.0)
    with record_launches() as launches, patch.object(dist, "all_reduce") as all_reduce:
        optimizer.step()
    updates = sum(isinstance(launch, UpdateLaunch) for launch in launches)
    share = scaling.Share.of(layout, ranks, 4)
    assert (updates, len(launches) - updates) == (share.launches, share.launches)
    assert all_reduce.call_count == share.all_reduces
    assert share.launches == (2 if layout is MISALIGNED else 1)
    assert share.params == sum(grad.numel() for grad in _gradients(layout, ranks))


def test_the_computed_table() -> None:
    text = scaling.table(ROWS)
    llama, moe = (
        [line for line in text.splitlines() if line.startswith(f"| {name} | 2,048 ")]
        for name in ("llama3-8b", "qwen3-30b-a3b")
    )
    params = scaling.Share.of(suites.llama3_8b(), 2048, 4).params
    assert llama == [
        f"| llama3-8b | 2,048 | 291 | {params:,} | 3.4 % | {params * 20 / 1e6:.1f} "
        f"| {params * 20 / 3.35e9:.3f} | {params * 14 / 1e6:.1f} | {params * 14 / 3.35e9:.3f} "
        "| 0.58 | 2 + 2 | 1 |"
    ]
    assert " 37.73 | 2 + 2 | 1 |" in moe[0]  # 18,867 tensors of 2 us
    assert "2.00 us a tensor, measured over 20,000 DTensors on made-up" in text
    assert "| llama3-8b | 1 | 291 | 8,030,261,248 | 0.0 % | 160,605.2 * | 47.942 |" in text
    assert "| 0.58 | 1 + 1 | 0 |" in text


def test_from_how_many_ranks_on_the_host_takes_longer() -> None:
    """8.03e9 parameters of 20 bytes at 3.35 TB/s are 47.9 ms: above 0.582 ms on up to 64 ranks."""
    assert scaling._host_bound(suites.llama3_8b(), 2.0) == 128
    assert scaling._host_bound(suites.llama3_8b(), 1e6) == 1
