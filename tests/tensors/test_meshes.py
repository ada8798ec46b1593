"""DTensors of one process: what raises. `test_distributed.py` has several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assertions import raises
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn import Parameter

import triton_optim
from triton_optim.tensors import sharding


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _on(device_type: str) -> Parameter:
    """A parameter on the CPU whose mesh says otherwise: there is no other device to be had here."""
    mesh = DeviceMesh("cpu", [0])
    param = Parameter(DTensor.from_local(torch.ones(3, device="cpu"), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.ones(3, device="cpu"), mesh, [Replicate()])
    other = DeviceMesh(device_type, [0], _init_backend=False)
    tensors: list[Any] = [param, param.grad]
    for tensor in tensors:
        spec = tensor._spec
        tensor._spec = DTensorSpec(other, spec.placements, spec.tensor_meta)
    return param


@pytest.mark.usefixtures("one_process")
def test_a_norm_over_meshes_of_mixed_devices() -> None:
    params = [_on("cpu"), _on("meta")]
    optimizer = triton_optim.SGD(params, max_grad_norm=1.0)
    with raises("meshes of cpu and meta devices", optimizer, [*map(sharding.local, params)]):
        optimizer.step()
