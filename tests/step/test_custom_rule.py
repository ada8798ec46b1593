"""A rule that a user writes has all that built-in ones have."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assertions import assert_no_worse, assert_same_bits, updates_among
from cases import DEVICE, SPECS, Tensors, double, grad_of, new_param, scaled_step
from fake_graph import fake_cuda
from lion import Lion, lion_reference
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import triton_optim
from triton_optim import FusedOptimizer
from triton_optim.launch.launcher import record_launches

FEW = SPECS[:3]


class Reference(Lion):
    """Steps in torch's operations."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **{**kwargs, "fused": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lion_is_its_reference(dtype: torch.dtype) -> None:
    """No less exact, in one launch over groups with rates of their own."""
    runs: Any = [Tensors(dtype), Tensors(dtype), Tensors(dtype, double(dtype))]
    for tensors, make in zip(runs, (Lion, Reference, Reference), strict=True):
        half = len(tensors.params) // 2
        groups = [{"params": tensors.params[:half]}, {"params": tensors.params[half:], "lr": 0.05}]
        optimizer = make(groups, lr=0.01, weight_decay=0.1)
        with record_launches() as launches:
            tensors.train(optimizer, 3)
        aligned = {launch.variant for launch in launches}
        assert len(launches) == (0 if make is Reference else 3 * len(aligned))
    ours, theirs, exact = (tensors.params for tensors in runs)
    assert_no_worse(ours, theirs, exact, "parameter")


def test_clipping_and_scaler() -> None:
    ours, theirs = Tensors(torch.float32, specs=FEW), Tensors(torch.float32, specs=FEW)
    optimizer = Lion(ours.params, lr=0.01, fused=True, max_grad_norm=0.5)
    reference = Reference(theirs.params, lr=0.01)
    for skips in (False, True, False):
        for tensors in (ours, theirs):
            tensors.new_gradients()
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
        for grad in ours.grads:
            grad.mul_(8)
        scaled_step(optimizer, float(skips), 8.0)
        if not skips:
            reference.step()
    torch.testing.assert_close(ours.params, theirs.params)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_state_dict_there_and_back() -> None:
    ours, theirs = Tensors(torch.float32, specs=FEW), Tensors(torch.float32, specs=FEW)
    first = Lion(ours.params, lr=0.01)
    ours.train(first, 2)
    theirs.train(Lion(theirs.params, lr=0.01), 2)
    resumed, fallen_back = Lion(ours.params, lr=1.0), Reference(theirs.params, lr=1.0)
    for optimizer in (resumed, fallen_back):
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [*first.state_dict()["state"][0]] == ["step", "exp_avg"]
    assert resumed.param_groups[0]["lr"] == 0.01
    ours.train(resumed, 2)
    theirs.train(fallen_back, 2)
    torch.testing.assert_close(ours.params, theirs.params)


def test_step_in_backward() -> None:
    model, other = (torch.nn.Linear(4, 3, device=DEVICE) for _ in range(2))
    other.load_state_dict(model.state_dict())
    triton_optim.step_in_backward(model, Lion(model.parameters(), lr=0.1))
    optimizer = Lion(other.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(2, 4, device=DEVICE)
        model(x).square().sum().backward()
        other(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits([*model.parameters()], [*other.parameters()])


@pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")
def test_replays_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    with fake_cuda(monkeypatch):
        for graphed in (True, False):
            torch.manual_seed(0)
            params = [new_param(5), new_param(70)]
            lr = torch.tensor(0.1, dtype=torch.float64)
            optimizer = Lion(params, lr=lr, capturable=True)
            optimizer.step()
            step = triton_optim.GraphedStep(optimizer) if graphed else optimizer.step
            for factor in (2.0, -1.0, 0.5):
                for param in params:
                    grad_of(param).mul_(factor).add_(0.1)
                lr.mul_(0.5)
                step()
            runs.append([params, optimizer.state_dict()["state"]])
    assert_same_bits(*runs)


def test_dtensors(tmp_path: Path) -> None:
    """Their local shards, in one launch: the bits of plain tensors."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh(DEVICE, [0])
        plain = [new_param(4, 3), new_param(7, 2)]
        sharded = []
        for param in plain:
            assert param.grad is not None
            on_mesh = DTensor.from_local(param.detach().clone(), mesh, [Shard(0)])
            sharded.append(Parameter(on_mesh))
            sharded[-1].grad = DTensor.from_local(param.grad.clone(), mesh, [Shard(0)])
        optimizers = [Lion(params, lr=0.1, fused=True) for params in (plain, sharded)]
        for optimizer in optimizers:
            for _ in range(2):
                with record_launches() as launches:
                    optimizer.step()
                assert len(updates_among(launches)) == 1
        assert_same_bits(plain, [param.to_local().detach() for param in sharded])  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def test_a_fallback_leaves_the_groups_alone() -> None:
    """Buckets of other devices may step in another thread meanwhile."""
    seen: list[int] = []

    def reference(param: Any, grad: Any, state: Any, group: Any) -> None:
        seen.append(sum(len(group["params"]) for group in optimizer.param_groups))
        lion_reference(param, grad, state, group)

    class Watching(FusedOptimizer):
        rule = replace(Lion.rule, reference=reference)

    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, device=DEVICE) for _ in range(2)))
    optimizer = Watching(model.parameters(), fused=False)
    triton_optim.step_in_backward(model, optimizer, bucket_bytes=0)
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    assert seen == [4] * 4
    assert len(optimizer.state) == 4


def test_a_fallback_that_raises_counts_nothing() -> None:
    """The reference sees the count of the update that it makes."""
    seen: list[float] = []

    def reference(param: Any, grad: Any, state: Any, group: Any) -> None:
        seen.append(float(state["step"]))
        if len(seen) == 2:
            raise KeyboardInterrupt
        lion_reference(param, grad, state, group)

    class Failing(FusedOptimizer):
        rule = replace(Lion.rule, reference=reference)

    param = new_param(3)
    optimizer = Failing([param], fused=False)
    optimizer.step()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.step()
    assert seen == [1, 2, 2]
    assert optimizer.state[param]["step"] == 2


def test_copies_and_defaults() -> None:
    param = new_param(5)
    optimizer = Lion([param], lr=0.5, max_grad_norm=2.0)
    again = type(optimizer)([param], **optimizer.defaults)
    assert again.max_grad_norm == 2.0
    assert again.param_groups[0]["lr"] == 0.5
    assert {*optimizer.param_groups[0]} == {"params", "lr", "beta1", "beta2", "weight_decay"}
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "after a step"])
def test_a_key_that_only_some_groups_have_is_followed(later: bool) -> None:
    """A rule reads it with a default for the others; a step uses the value that it has then."""

    class Scaled(FusedOptimizer):
        rule = replace(Lion.rule, hyperparameters=_scaled_rate)

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.01})

    ours, theirs = Tensors(torch.float32, specs=FEW), Tensors(torch.float32, specs=FEW)
    groups = [[{"params": t.params[:1]}, {"params": t.params[1:]}] for t in (ours, theirs)]
    optimizer, reference = Scaled(groups[0]), Reference(groups[1], lr=0.01)
    for step, scale in enumerate((1.0, 2.0, 8.0, 0.0)):
        if step > 0 or not later:
            optimizer.param_groups[1]["scale"] = scale
        reference.param_groups[1]["lr"] = 0.01 * scale
        ours.train(optimizer, 1)
        theirs.train(reference, 1)
        torch.testing.assert_close(ours.params, theirs.params)


def _scaled_rate(group: dict[str, Any]) -> tuple[float, ...]:
    return group["lr"] * group.get("scale", 1.0), 0.9, 0.99, 0.0
