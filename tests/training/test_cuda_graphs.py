"""CUDA graphs, on one that is pretended: see fake_graph.py. Real ones are in test_gpu.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, Case, every_state, grad_of, new_param
from fake_graph import FakeGraph
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR

import triton_optim
from triton_optim import GraphedStep

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")


def _make(case: Case, params: list[Parameter], **kwargs: Any) -> Any:
    lr = torch.tensor(case.kwargs["lr"], dtype=torch.float64)
    optimizer = case.ours(params, lr=lr, capturable=True, **kwargs)
    optimizer.step()
    return optimizer


def _problem() -> tuple[list[Parameter], Parameter, list[Any]]:
    """Parameters, one of them with a gradient in another memory order, and further gradients."""
    params = [new_param(5), new_param(70), new_param(3, 4)]
    params[2].grad = torch.randn(4, 3).t()
    more = [[torch.randn(p.shape) for p in params] for _ in range(4)]
    return params, params[2], more


def _stepped_twins(case: Case) -> tuple[list[Parameter], list[Parameter], list[Any], list[Any]]:
    """Parameters and copies of them, an optimizer of each after a step, and gradients."""
    params, _, more = _problem()
    twins, optimizers = copy.deepcopy(params), []
    for ps in (params, twins):
        for param, grad in zip(ps, more[0], strict=True):
            param.grad = grad.clone()
        optimizers.append(_make(case, ps))
    return params, twins, optimizers, more


@pytest.mark.usefixtures("cuda")
@every_state
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_replays_are_steps(case: Case, kwargs: dict[str, Any]) -> None:
    """With gradients written in place and a scheduler that changes the rate between them."""
    runs = []
    for graphed in (True, False):
        torch.manual_seed(0)
        params, _, more = _problem()
        optimizer = _make(case, params, **kwargs)
        before = copy.deepcopy([params, optimizer.state_dict()])
        step: Callable[[], object] = GraphedStep(optimizer) if graphed else optimizer.step
        assert_same_bits([params, optimizer.state_dict()], before)
        scheduler = ExponentialLR(optimizer, 0.5)
        optimizer._opt_called = True
        norms = []
        for grads in more:
            for param, grad in zip(params, grads, strict=True):
                grad_of(param).copy_(grad)
            versions = [param._version for param in params]
            step()
            assert all(p._version > v for p, v in zip(params, versions, strict=True))
            norms.append(optimizer.grad_norm)
            scheduler.step()
        runs.append([params, norms, optimizer.state_dict()["state"]])
    assert_same_bits(*runs)
    assert runs[0][1][0] is None or runs[0][1][0] != runs[0][1][1]


@pytest.mark.usefixtures("cuda")
@every_state
def test_eager_steps_between_replays(case: Case) -> None:
    """A replay uses the gradients that it captured, an eager step those that there are."""
    params, twins, optimizers, more = _stepped_twins(case)
    captured = [param.grad for param in params]
    graph = FakeGraph()
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        optimizers[0].step()
    for eager in (True, False, True, False):
        for ps, optimizer in zip((params, twins), optimizers, strict=True):
            for i, param in enumerate(ps):
                param.grad = (
                    more[1][i].clone() if eager else (captured[i] if ps is params else more[0][i])
                )
            if ps is params and not eager:
                graph.replay()
            else:
                optimizer.step()
    assert_same_bits(params, twins)


@pytest.mark.usefixtures("cuda")
@every_state
def test_an_eager_step_with_gradients_where_they_were(case: Case) -> None:
    """As the caching allocator places them: what was sent last is not what a replay left."""
    params, twins, optimizers, more = _stepped_twins(case)
    captured = [param.grad for param in params]
    eager = [[grad.clone() for grad in more[1]] for _ in (params, twins)]

    def step(own: int) -> None:
        for param, grad in zip((params, twins)[own], eager[own], strict=True):
            param.grad = grad
        optimizers[own].step()

    graph = FakeGraph()
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        optimizers[0].step()
    for _ in range(2):
        step(0)
        graph.replay()
        step(0)
        step(1)
        for param, grad in zip(twins, captured, strict=True):
            assert grad is not None
            param.grad = grad.clone()
        optimizers[1].step()
        step(1)
    assert_same_bits(params, twins)


@pytest.mark.usefixtures("cuda")
def test_skipped_replays_are_counted() -> None:
    param = new_param(5)
    optimizer = triton_optim.RMSprop(
        [param], lr=torch.tensor(0.1), capturable=True, max_grad_norm=1.0, skip_nonfinite=True
    )
    optimizer.step()
    step = GraphedStep(optimizer)
    for n, value in enumerate((float("inf"), float("nan"), float("inf"), 1.0)):
        grad_of(param).fill_(value)
        step()
        assert optimizer.skipped_steps == min(n + 1, 3)
    optimizer.step()
    param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 4


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_steps_are_counted_on_the_device(name: str) -> None:
    params = [new_param(5), new_param(7)]
    optimizer = getattr(triton_optim, name)(params, lr=torch.tensor(0.1), capturable=True)
    optimizer.step()
    step = GraphedStep(optimizer)
    step()
    step()
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    assert set(counts) <= {3.0}


@pytest.mark.usefixtures("cuda")
def test_replays_read_tensors() -> None:
    """Rate, betas and weight decay that are changed in place between replays."""
    runs = []
    for graphed in (True, False):
        torch.manual_seed(0)
        param = new_param(70)
        values = [torch.tensor(v, dtype=torch.float64) for v in (0.1, 0.8, 0.99, 0.1)]
        lr, beta1, beta2, weight_decay = values
        optimizer = triton_optim.AdamW(
            [param], lr, (beta1, beta2), weight_decay=weight_decay, capturable=True
        )
        optimizer.step()
        step: Callable[[], object] = GraphedStep(optimizer) if graphed else optimizer.step
        for value in values:
            step()
            value.mul_(0.5)
        step()
        runs.append([param, optimizer.state_dict()["state"]])
    assert_same_bits(*runs)


STORED: list[dict[str, Any]] = [{"master_weight_bits": 32}, {"stochastic_rounding": True}]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("options", STORED, ids=str)
def test_replays_of_stored_formats(options: dict[str, Any]) -> None:
    """Round by the step that is counted on the device; a parameter that was written starts anew."""
    runs = []
    for graphed in (True, False):
        torch.manual_seed(0)
        param = new_param(20, dtype=torch.bfloat16)
        optimizer = triton_optim.SGD(
            [param], torch.tensor(1e-3), momentum=0.9, capturable=True, **options
        )
        optimizer.step()
        with torch.no_grad():
            param.mul_(3)
        step: Callable[[], object] = GraphedStep(optimizer) if graphed else optimizer.step
        step()
        step()
        with torch.no_grad():
            param.mul_(3)
        step()
        runs.append([param, optimizer.state_dict()["state"]])
    assert_same_bits(*runs)
