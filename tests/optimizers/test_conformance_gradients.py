"""Gradients of every kind, under every configuration of torch's own database."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, SCALARS, Tensors, grad_of
from paired_optimizers import Pair
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_optim_db import Config, every_config, every_optimizer, sparse, step_all, tensors_of

from triton_optim.launch.variant import Variant

SPECS = tuple(spec for spec in cases.SPECS if spec.name in ("0-dim", "block+1", "2d"))


def _rosenbrock(point: Tensor) -> Tensor:
    x, y = point.flatten().unbind()
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@pytest.mark.parametrize(("case", "constructors"), list(sparse()))
def test_rosenbrock_with_sparse_gradients(case: Config, constructors: Sequence[Any]) -> None:
    """Uncoalesced, of x and of y in turn: as torch's, and as dense gradients.

    Two rows of one element, for torch writes a vector's sum elsewhere if the vector does not start
    its memory, as between guard bytes.
    """
    maximize = case.kwargs.get("maximize", False)
    points = []
    for make, dense in ((case.theirs, False), (case.ours, False), (case.ours, True)):
        point = Parameter(torch.full((2, 1), 1.5, dtype=torch.float64, device=DEVICE))
        optimizer = make([point])
        schedulers = [new(optimizer) for new in constructors]
        for step in range(4 if maximize else 20):
            loss = _rosenbrock(point)
            (grad,) = torch.autograd.grad(loss, point)
            i = step % 2
            halves = torch.stack((0.25 * grad[i], 0.75 * grad[i]))
            indices = torch.full((1, 2), i, device=DEVICE)
            point.grad = torch.sparse_coo_tensor(indices, halves, (2, 1))
            if dense:
                point.grad = point.grad.to_dense()
            optimizer.step()
            step_all(schedulers, loss)
        assert (_rosenbrock(point) > _rosenbrock(torch.full((2, 1), 1.5))) == maximize
        points.append(point.detach())
    for other in points[1:]:
        torch.testing.assert_close(other, points[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [None, True, False])
@every_config
def test_gradients_are_never_written(case: Config, fused: bool | None) -> None:
    names = {"2d", "transposed", "misaligned-grad", "grad-unlike", "grad-expanded"}
    specs = [spec for spec in cases.SPECS if spec.name in names]
    tensors = Tensors(torch.float32, specs=specs)
    optimizer = case.ours(tensors.params, fused=fused)
    for _ in range(2):
        tensors.new_gradients()
        grads = [param.grad for param in tensors.params if param.grad is not None]
        before = copy.deepcopy(grads)
        versions = [grad._version for grad in grads]
        optimizer.step()
        assert_same_bits(grads, before)
        assert [grad._version for grad in grads] == versions


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_config
def test_nan_and_infinite_gradients(case: Config, value: float) -> None:
    """They spoil what torch's spoil, and nothing else, then and later."""
    runs = [Tensors(torch.float64, specs=SPECS) for _ in range(2)]
    optimizers = [case.ours(runs[0].params), case.theirs(runs[1].params)]
    for step in range(3):
        for tensors, optimizer in zip(runs, optimizers, strict=True):
            tensors.new_gradients()
            if step == 1:
                for param in tensors.params:
                    grad_of(param).view(-1)[:2] = value
            optimizer.step()
    ours, theirs = map(tensors_of, optimizers)
    ignored = case.optimizer == "Rprop"  # a NaN has no sign, and infinity has one
    assert all(bool(param.isfinite().all()) for param in ours["param"]) == ignored
    for name, values in ours.items():
        same = name not in SCALARS
        torch.testing.assert_close(
            values, theirs[name], rtol=1e-12, atol=1e-12, equal_nan=True, check_device=same
        )


@every_config
def test_zero_gradients(case: Config) -> None:
    def step(optimizer: Optimizer, params: list[Parameter]) -> None:
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()

    both = Pair(case)
    before = copy.deepcopy(both.tensors[0].params)
    for _ in range(2):
        both.each(step)
        both.check()
    if not {"weight_decay", "lambd"} & {k for k, v in both.optimizers[0].defaults.items() if v}:
        assert_same_bits(both.tensors[0].params, before)


@every_config
def test_no_gradients(case: Config, launches: list[Variant]) -> None:
    """Neither before a first step nor after it."""
    both = Pair(case)
    for steps in (0, 2):
        both.step(steps)
        before = copy.deepcopy((both.tensors[0].params, both.optimizers[0].state_dict()["state"]))
        both.step(2, without=(0, 1, 2, 3))
        assert len(launches) == steps
        after = both.tensors[0].params, both.optimizers[0].state_dict()["state"]
        assert_same_bits(after, before)


@every_config
def test_parameters_without_elements(case: Config, launches: list[Variant]) -> None:
    specs = [spec for spec in cases.SPECS if spec.name.startswith("empty")]
    states = []
    for make in (case.ours, case.theirs):
        tensors = Tensors(torch.float32, specs=specs)
        optimizer = make(tensors.params)
        tensors.train(optimizer, 3)
        states.append(optimizer.state_dict()["state"])
    assert_same_bits(*states)
    assert launches == []


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@every_optimizer
def test_the_default_dtype_decides_that_of_the_step(case: Config, default: torch.dtype) -> None:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        Pair(case).step(3)
    finally:
        torch.set_default_dtype(usual)


@every_config
def test_differentiable_passes_gradcheck(case: Config) -> None:
    """Through parameter, gradient, state, and SGD's hyperparameters that torch differentiates."""
    inputs = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    like = Parameter(torch.ones(3, dtype=torch.float64))
    like.grad = torch.ones_like(like)
    (theirs := case.theirs([like])).step()
    made = theirs.state.get(like, {})
    scalars = {name: value.detach() for name, value in made.items() if name in SCALARS}
    states = [name for name in made if name not in SCALARS]
    hypers = ["lr", "weight_decay"] if case.optimizer == "SGD" else []
    for name in states:
        scale = 0.01 if name == "grad_avg" else 1.0  # its square is less than square_avg
        inputs.append((scale * torch.rand(3, dtype=torch.float64)).requires_grad_())
    inputs += [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in hypers]

    def step(param: Tensor, grad: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        param = param.clone()
        param.grad = grad.clone()
        n = len(states)
        kwargs = dict(zip(hypers, others[n:], strict=True))
        optimizer = case.ours([param], differentiable=True, **kwargs)
        values = [value.clone() for value in others[:n]]
        state = optimizer.state[param] if states else {}
        state.update(zip(states, values, strict=True))
        state.update({name: value.clone() for name, value in scalars.items()})
        state.update(step=torch.zeros(()))
        optimizer.step()
        return param, *(state[name] for name in states)

    torch.autograd.gradcheck(step, inputs)
