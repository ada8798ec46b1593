"""What only a GPU can show of CUDA graphs and of the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import raises
from cases import Case, Spec, Tensors, every_state, new_param

import triton_optim

pytestmark = pytest.mark.gpu
SPECS = (Spec("a", lambda draw: draw(5)), Spec("b", lambda draw: draw(100, 77)))


def _rate(case: Case) -> torch.Tensor:
    return torch.tensor(case.kwargs["lr"], device="cuda", dtype=torch.float64)


@every_state
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_a_whole_step_in_a_graph(case: Case, kwargs: dict[str, Any]) -> None:
    """Forward, backward and step together; a scheduler changes the rate between replays."""
    models = [torch.nn.Linear(7, 3, device="cuda", dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    made = [case.ours(m.parameters(), lr=_rate(case), capturable=True, **kwargs) for m in models]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in made]
    batch = torch.randn(5, 7, device="cuda", dtype=torch.float64)
    side = torch.cuda.Stream()

    def train(i: int) -> None:
        models[i](batch).square().sum().backward()
        made[i].step()

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in (0, 1, 0, 1):
            made[i].zero_grad(set_to_none=True)
            train(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    made[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        train(0)
    for _ in range(4):
        batch.copy_(torch.randn_like(batch))
        graph.replay()
        made[1].zero_grad(set_to_none=True)
        train(1)
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@every_state
def test_a_graphed_step(case: Case) -> None:
    ours, theirs = (Tensors(torch.float64, specs=SPECS) for _ in range(2))
    optimizer = case.ours(ours.params, lr=_rate(case), capturable=True)
    other = case.theirs(theirs.params)
    ours.train(optimizer, 1)
    theirs.train(other, 1)
    step = triton_optim.GraphedStep(optimizer)
    for lr in (0.3, 0.1):
        optimizer.param_groups[0]["lr"].fill_(lr)
        other.param_groups[0]["lr"] = lr
        theirs.new_gradients()
        for p, q in zip(ours.params, theirs.params, strict=True):
            assert p.grad is not None and q.grad is not None
            p.grad.copy_(q.grad)
        step()
        other.step()
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-12, atol=1e-12)
    optimizer.zero_grad()
    with raises("stale memory", optimizer, ours.params):
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_norm_has_the_same_bits_every_time(dtype: torch.dtype) -> None:
    params = [new_param(n, dtype=dtype) for n in (10**7, 1, 12345, *[999] * 300)]
    optimizer = triton_optim.SGD(params, lr=0.0, max_grad_norm=1.0)
    norms = []
    for _ in range(50):
        optimizer.step()
        assert optimizer.grad_norm is not None
        norms.append(optimizer.grad_norm)
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    exact = torch.nn.utils.get_total_norm([p.grad.double() for p in params if p.grad is not None])
    torch.testing.assert_close(norms[0].double(), exact, rtol=1e-6, atol=0)
