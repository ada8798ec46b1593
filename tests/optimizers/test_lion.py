"""Lion, which torch does not have: beside the paper's equation and torch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_same_bits, raises, updates_among
from cases import DEVICE, SPECS, Tensors, new_param
from paired_optimizers import SPECS as FEW_SPECS
from reference import Reference
from torch.nn import Parameter

import triton_optim
from triton_optim import Lion
from triton_optim.launch.launcher import record_launches

SETTINGS: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.3, 0.0), "weight_decay": 0.1, "maximize": True},
]
every_setting = pytest.mark.parametrize("kwargs", SETTINGS, ids=str)


@every_setting
def test_the_papers_equation(kwargs: dict[str, Any]) -> None:
    tensors = Tensors(torch.float64)
    exact = [Reference("Lion", param, **kwargs) for param in tensors.params]
    optimizer = Lion(tensors.params, **kwargs, fused=True)
    with record_launches() as launches:
        for _ in range(4):
            tensors.new_gradients()
            for reference, param in zip(exact, tensors.params, strict=True):
                assert param.grad is not None
                reference.step(param.grad)
            optimizer.step()
    assert len(updates_among(launches)) == 4 * 2  # aligned, and not
    for spec, param, reference in zip(SPECS, tensors.params, exact, strict=True):
        assert reference.error(param) <= 4 * reference.unit(), spec.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_setting
def test_the_fallback(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """`fused=False` takes torch's operations, as one that no kernel takes; state is the same."""
    ours, theirs = Tensors(dtype, specs=FEW_SPECS), Tensors(dtype, specs=FEW_SPECS)
    optimizers = Lion(ours.params, **kwargs), Lion(theirs.params, **kwargs, fused=False)
    for tensors, optimizer in zip((ours, theirs), optimizers, strict=True):
        tensors.train(optimizer, 1)
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q)
        a, b = optimizers[0].state[p], optimizers[1].state[q]
        assert list(a) == list(b) == ["step", "exp_avg"]
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"])
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    ours.train(optimizers[0], 1)


def test_the_fallback_takes_what_the_kernels_take() -> None:
    """Both parts of complex elements, tensors of one element, parameters without dims."""
    one: dict[str, Any] = {"lr": torch.tensor([0.01]), "weight_decay": torch.tensor([0.1])}
    betas = torch.tensor([0.9]), torch.tensor([0.98])
    runs = []
    for fused in (None, False):
        params = [Parameter(torch.ones((), device=DEVICE)),
                  Parameter(torch.full((3,), 1 - 2j, device=DEVICE)),
                  Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))]  # fmt: skip
        for param in params:
            param.grad = param.detach().clone()
        optimizer = Lion(params, betas=betas, **one, fused=fused)
        optimizer.step()
        runs.append([*params, *(optimizer.state[param]["exp_avg"] for param in params)])
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("fused", [None, True, False])
def test_sparse_gradients(fused: bool | None) -> None:
    dense, sparse = new_param(4), new_param(4, 3)
    sparse.grad = torch.ones(4, 3, device=DEVICE).to_sparse(1)
    optimizer = Lion([dense, sparse], fused=fused)
    message = "Lion does not support sparse gradients, as that of parameter 1 of group 0"
    with raises(message, optimizer, [dense, sparse]):
        optimizer.step()
    assert not optimizer.state


def test_a_gradient_that_is_nan_moves_nothing() -> None:
    param = new_param(5)
    before = param.detach().clone()
    param.grad = torch.full_like(param, float("nan"))
    Lion([param]).step()
    assert_same_bits(param.detach(), before)


def test_groups_and_schedulers() -> None:
    params = [Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = Lion(groups, lr=0.25)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert [param[0].item() for param in params] == [1 - 0.375, 1 - 0.75]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (0.9,)}, "two betas"),
        ({"lr": torch.ones(2)}, "lr has 2 elements; give it a number, or a tensor of one element"),
        ({"weight_decay": torch.ones(0)}, "weight_decay has 0 elements; give it a number"),
    ],
    ids=str,
)
def test_mistakes(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton_optim.Lion([new_param(2)], **kwargs)


def test_decay_is_always_decoupled() -> None:
    message = "Lion's weight decay is always decoupled; leave decoupled_weight_decay out"
    group: dict[str, Any] = {"params": [new_param(2)], "decoupled_weight_decay": False}
    with pytest.raises(TypeError, match=message):
        triton_optim.Lion(group["params"], decoupled_weight_decay=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=message):
        triton_optim.Lion([group])
    optimizer = Lion([new_param(3)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
