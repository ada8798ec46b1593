"""CUDA graphs, on one that is pretended: see fake_graph.py. Real ones are in test_gpu.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE, STATEFUL_CASES, Case, assert_same_bits, new_param, refused
from fake_graph import FakeGraph, fake_cuda
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

import triton_optim
from triton_optim import GraphedStep
from triton_optim.launch import backend

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")
every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


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


def _stepped_twins(
    case: Case,
) -> tuple[list[Parameter], list[Parameter], list[Any], list[Any]]:
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
                assert param.grad is not None
                param.grad.copy_(grad)
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
        assert param.grad is not None
        param.grad.fill_(value)
        step()
        assert optimizer.skipped_steps == min(n + 1, 3)
    optimizer.step()
    param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 4


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_a_scaler_that_no_step_had_before(name: str) -> None:
    """Its kernel would be compiled under capture."""
    param = new_param(5)
    optimizer = triton_optim.RMSprop([param], lr=torch.tensor(0.1), capturable=True)
    optimizer.step()
    value = torch.zeros(()) if name == "found_inf" else torch.ones(())
    vars(optimizer)[name] = value
    message = "run a few steps first"
    with refused(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()
    vars(optimizer)[name] = value
    optimizer.step()
    vars(optimizer)[name] = value
    with torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


@pytest.mark.usefixtures("cuda")
def test_a_torch_that_pins_no_memory_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for version, captures in (("2.10.0+cu128", False), ("2.11.0", True), ("2.13.1+cpu", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert backend.captures_pinned_memory() == captures
    monkeypatch.undo()
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(backend, "captures_pinned_memory", lambda: False)
        optimizer = triton_optim.SGD([new_param(5)], lr=torch.tensor(0.1), capturable=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"use 2\.11 or newer"):
            GraphedStep(optimizer)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("gpus", "message"),
    [(("cuda:0", "cuda:1"), "on cuda:0 and cuda:1; give"), (("cuda:1",), "which are on cuda:1")],
)
def test_captures_of_other_gpus(
    gpus: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph would be empty, and the step real."""
    param = new_param(5)
    optimizer = triton_optim.SGD([param], lr=torch.tensor(0.1), capturable=True)
    optimizer.step()
    assert optimizer._stepper.plan is not None
    optimizer._stepper.plan.gpus = {*map(torch.device, gpus)}
    monkeypatch.setattr(backend, "is_capturing", lambda _: False)
    with refused(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


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


def _moved(params: list[Parameter], optimizer: Any) -> None:
    params[0].grad = torch.ones_like(params[0])


def _cleared(params: list[Parameter], optimizer: Any) -> None:
    optimizer.zero_grad()


def _relocated(params: list[Parameter], optimizer: Any) -> None:
    params[1].data = params[1].data.clone()


def _replaced(params: list[Parameter], optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)


def _restored(params: list[Parameter], optimizer: Any) -> None:
    state = optimizer.state[params[0]]
    state["square_avg"] = state["square_avg"].clone()


def _clipped(params: list[Parameter], optimizer: Any) -> None:
    optimizer.max_grad_norm = 0.5


def _rebuilt(params: list[Parameter], optimizer: Any) -> None:
    optimizer._stepper.plan = None
    optimizer.step()


def _decayed(params: list[Parameter], optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_moved, "stale memory; keep gradients in place"),
        (_cleared, "stale memory; keep gradients in place"),
        (_relocated, "stale memory"),
        (_replaced, "fill a rate in place"),
        (_decayed, "make a new GraphedStep"),
        (_restored, "stale memory"),
        (_clipped, "max_grad_norm was replaced"),
        (_rebuilt, "stale memory"),
    ],
)
def test_what_a_replay_would_not_see(change: Callable[..., None], message: str) -> None:
    params = [new_param(5), new_param(7)]
    optimizer = triton_optim.RMSprop(params, lr=torch.tensor(0.1), capturable=True)
    optimizer.step()
    step = GraphedStep(optimizer)
    step()
    change(params, optimizer)
    with refused(message, optimizer, params):
        step()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
@pytest.mark.parametrize(
    ("kwargs", "stepped", "message"),
    [
        ({}, True, "pass capturable=True"),
        (
            {"capturable": True, "lr": 0.1},
            True,
            "lr of group 0 is 0.1, which a replay would repeat",
        ),
        ({"capturable": True}, False, "run a few steps first"),
        (
            {"capturable": True, "max_grad_norm": 1.0, "error_if_nonfinite": True},
            True,
            "error_if_nonfinite waits for the device",
        ),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_captured(
    name: str, kwargs: dict[str, Any], stepped: bool, message: str
) -> None:
    param = new_param(5)
    optimizer = getattr(triton_optim, name)([param], **{"lr": torch.tensor(0.1), **kwargs})
    if name == "Rprop" and "lr" in kwargs:  # updates do not read it
        optimizer.step()
        GraphedStep(optimizer)()
        return
    if stepped:
        optimizer.step()
    with refused(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("name", "kwargs"), [("Adam", {}), ("RMSprop", {"momentum": 0.9})])
def test_a_momentum_that_a_scheduler_cycles(name: str, kwargs: dict[str, Any]) -> None:
    param, lr = new_param(5), torch.tensor(0.1)
    optimizer = getattr(triton_optim, name)([param], lr=lr, capturable=True, **kwargs)
    OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.step()
    message = "cycles the momentum of group 0.*cycle_momentum=False"
    with refused(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


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


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_capturable_with_cpu_parameters(name: str) -> None:
    params = [new_param(5), new_param(3)]
    optimizer = getattr(triton_optim, name)(params, capturable=True)
    with refused("parameter 0 of group 0 is on cpu", optimizer, params):
        optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("kwargs", [{"foreach": True}, {"fused": False}, {"differentiable": True}])
def test_capturable_needs_the_kernels(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="`capturable` does not support"):
        getattr(triton_optim, name)([Parameter(torch.ones(1))], capturable=True, **kwargs)
