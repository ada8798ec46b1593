"""Row-wise Adagrad: the kernels, the fallback, and an independent reference."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same_bits, largest, updates_among
from cases import DEVICE, grad_of
from embedding_tables import Tables, worst
from torch import Tensor, nn
from torch.nn import Parameter

from triton_optim import RowwiseAdagrad
from triton_optim.launch.launcher import record_launches

KWARGS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"initial_accumulator_value": 0.5, "eps": 0.1},
)
every_kwargs = pytest.mark.parametrize("kwargs", KWARGS, ids=lambda k: "+".join(k) or "plain")
SHAPES = ((20, 8), (7,), (4, 3, 3), (6, 5))


class Reference:
    """Row by row, in numpy's float64."""

    def __init__(self, param: Tensor, **kwargs: Any) -> None:
        self.param = param.detach().double().cpu().numpy().copy()
        self._args = {"eps": 1e-10, **kwargs}
        self.sum = np.full(param.shape[:1], self._args.get("initial_accumulator_value", 0.0))

    def step(self, grad: Tensor) -> None:
        touched = range(len(self.param))
        if grad.layout == torch.sparse_coo:
            touched = sorted(set(grad._indices()[0].tolist()))  # type: ignore[assignment]
        whole = grad.to_dense().double().cpu().numpy()
        lr, decay = self._args["lr"], self._args.get("weight_decay", 0.0)
        for i in touched:
            gradient = -whole[i] if self._args.get("maximize") else whole[i]
            row = self.param[i]
            if self._args.get("decoupled_weight_decay"):
                kept = row - lr * decay * row
            else:
                kept, gradient = row, gradient + decay * row
            self.sum[i] += np.mean(gradient**2)
            self.param[i] = kept - lr / (np.sqrt(self.sum[i]) + self._args["eps"]) * gradient


def _new_gradients(tables: Tables, step: int) -> None:
    """Sparse and dense ones in turn."""
    tables.new_gradients([30, 9, 5, 8])
    for i, param in enumerate(tables.params):
        if (i + step) % 2:
            assert param.grad is not None
            param.grad = tables.draw(*param.shape)


@every_kwargs
@pytest.mark.parametrize("fused", [True, False])
def test_it_is_the_formula(kwargs: dict[str, Any], fused: bool) -> None:
    tables = Tables(SHAPES)
    optimizer = RowwiseAdagrad(tables.params, lr=0.1, fused=fused, **kwargs)
    references = [Reference(param, lr=0.1, **kwargs) for param in tables.params]
    for step in range(4):
        _new_gradients(tables, step)
        for param, reference in zip(tables.params, references, strict=True):
            reference.step(grad_of(param))
        optimizer.step()
    for param, reference in zip(tables.params, references, strict=True):
        np.testing.assert_allclose(param.detach().cpu(), reference.param, rtol=1e-12, atol=1e-12)
        state = optimizer.state[param]
        np.testing.assert_allclose(state["sum"].cpu(), reference.sum, rtol=1e-12)
        assert state["step"] == 4


@every_kwargs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_no_larger_than_without_kernels(
    kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    runs = [Tables(SHAPES, dtype), Tables(SHAPES, dtype), Tables(SHAPES, dtype, torch.float64)]
    fused_flags = (True, False, False)
    optimizers = [
        RowwiseAdagrad(run.params, lr=0.1, fused=fused, **kwargs)
        for run, fused in zip(runs, fused_flags, strict=True)
    ]
    for step in range(4):
        for run, optimizer in zip(runs, optimizers, strict=True):
            _new_gradients(run, step)
            optimizer.step()
    ours, loop, exact = (run.params for run in runs)
    unit = torch.finfo(dtype).eps * max(map(largest, exact))
    assert worst(ours, exact) <= worst(loop, exact) + unit
    sums = [
        [optimizer.state[param]["sum"] for param in run.params]
        for optimizer, run in zip(optimizers, runs, strict=True)
    ]
    assert {value.dtype for value in sums[0]} == {torch.float32}
    if "weight_decay" not in kwargs:  # with it, gradients depend on how parameters were rounded
        assert worst(sums[0], sums[2]) < 1e-6 * max(map(largest, sums[2]))


def test_launches_are_shared() -> None:
    """By groups and tensors whose rows are as wide, dense and sparse gradients apart."""
    tables = Tables([(20, 8), (5, 7), (9, 8), (3, 6)], torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": tables.params[:2]},
        {"params": tables.params[2:], "lr": 0.3},
    ]
    optimizer = RowwiseAdagrad(groups, fused=True)
    tables.new_gradients([30, 9, 5, 3])
    with record_launches() as launches:
        optimizer.step()
    names = [launch.name for launch in updates_among(launches)]
    assert names == ["keys_kernel", "rows_kernel"]
    for param in tables.params[:3:2]:
        param.grad = torch.ones_like(param)
    with record_launches() as launches:
        optimizer.step()
    names = [launch.name for launch in updates_among(launches)]
    assert names == ["keys_kernel", "rows_kernel", "rows_kernel"]


def test_state_is_one_float32_a_row_and_stays_so() -> None:
    """Through state dicts too, which torch casts to the parameter's dtype."""
    param = Parameter(torch.ones(50, 16, dtype=torch.bfloat16, device=DEVICE))
    optimizer = RowwiseAdagrad([param], lr=0.1)
    for value in (1.0, 0.001):
        param.grad = torch.full_like(param, value)
        optimizer.step()
    state = optimizer.state[param]
    assert list(state) == ["step", "sum"]
    assert (state["sum"].dtype, state["sum"].shape) == (torch.float32, (50,))
    assert state["sum"][0] != 1  # which bfloat16 would have made of it
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = Parameter(param.detach().clone())
    fresh = RowwiseAdagrad([twin], lr=0.5)
    fresh.load_state_dict(saved)
    assert_same_bits(dict(fresh.state[twin]), dict(state))
    clone = copy.deepcopy(optimizer)
    for p, o in ((param, optimizer), (twin, fresh), (clone.param_groups[0]["params"][0], clone)):
        p.grad = torch.full_like(p, 0.5)
        o.step()
    assert_same_bits(twin.detach(), param.detach())
    assert_same_bits(clone.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("fused", [True, None, False])
def test_grad_scaler(fused: bool | None) -> None:
    weights = [Parameter(torch.ones(6, 3, device=DEVICE)) for _ in range(2)]
    scaled, plain = (RowwiseAdagrad([weight], lr=0.1, fused=fused) for weight in weights)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    for factor in (1.0, float("inf"), 2.0):
        for weight, optimizer in zip(weights, (scaled, plain), strict=True):
            optimizer.zero_grad()
            ids = torch.tensor([1, 1, 4], device=DEVICE)
            loss = nn.functional.embedding(ids, weight, sparse=True).square().sum() * factor
            if optimizer is scaled:
                scaler.scale(loss).backward()
                scaler.step(scaled)
                scaler.update()
            elif factor < 3:
                loss.backward()
                plain.step()
    assert_same_bits(weights[0].detach(), weights[1].detach())
    assert scaled.state[weights[0]]["step"] == 2
