"""Captures and replays that would be wrong raise, on a fake CUDA graph: see fake_graph.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import raises
from cases import DEVICE, new_param
from fake_graph import FakeGraph, fake_cuda
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

import triton_optim
from triton_optim import GraphedStep
from triton_optim.launch import backend

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")


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
    with raises(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
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
    with raises(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


def _set_grad(params: list[Parameter], optimizer: Any) -> None:
    params[0].grad = torch.ones_like(params[0])


def _set_data(params: list[Parameter], optimizer: Any) -> None:
    params[1].data = params[1].data.clone()


def _set_state(params: list[Parameter], optimizer: Any) -> None:
    state = optimizer.state[params[0]]
    state["square_avg"] = state["square_avg"].clone()


def _drop_plan(params: list[Parameter], optimizer: Any) -> None:
    optimizer._stepper.plan = None
    optimizer.step()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_grad, "stale memory; keep gradients in place"),
        (lambda _, o: o.zero_grad(), "stale memory; keep gradients in place"),
        (_set_data, "stale memory"),
        (lambda _, o: o.param_groups[0].update(lr=torch.tensor(0.5)), "fill a rate in place"),
        (lambda _, o: o.param_groups[0].update(weight_decay=0.5), "make a new GraphedStep"),
        (_set_state, "stale memory"),
        (lambda _, o: setattr(o, "max_grad_norm", 0.5), "max_grad_norm was replaced"),
        (_drop_plan, "stale memory"),
    ],
)
def test_what_a_replay_would_not_see(change: Callable[..., None], message: str) -> None:
    params = [new_param(5), new_param(7)]
    optimizer = triton_optim.RMSprop(params, lr=torch.tensor(0.1), capturable=True)
    optimizer.step()
    step = GraphedStep(optimizer)
    step()
    change(params, optimizer)
    with raises(message, optimizer, params):
        step()


@pytest.mark.usefixtures("cuda")
def test_a_list_that_is_edited() -> None:
    """It is the object that was captured, but a replay would not see its new value."""
    params = [new_param(5)]
    optimizer = triton_optim.AdamW(params, torch.tensor(0.1), capturable=True)
    betas = optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    optimizer.step()
    step = GraphedStep(optimizer)
    step()
    betas[1] = 0.5
    with raises("make a new GraphedStep", optimizer, params):
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
    with raises(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("name", "kwargs"), [("Adam", {}), ("RMSprop", {"momentum": 0.9})])
def test_a_momentum_that_a_scheduler_cycles(name: str, kwargs: dict[str, Any]) -> None:
    param, lr = new_param(5), torch.tensor(0.1)
    optimizer = getattr(triton_optim, name)([param], lr=lr, capturable=True, **kwargs)
    OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.step()
    message = "cycles the momentum of group 0.*cycle_momentum=False"
    with raises(message, optimizer, [param]), torch.cuda.graph(FakeGraph()):  # type: ignore[arg-type]
        optimizer.step()


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_capturable_with_cpu_parameters(name: str) -> None:
    params = [new_param(5), new_param(3)]
    optimizer = getattr(triton_optim, name)(params, capturable=True)
    with raises("parameter 0 of group 0 is on cpu", optimizer, params):
        optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("kwargs", [{"foreach": True}, {"fused": False}, {"differentiable": True}])
def test_capturable_needs_the_kernels(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="`capturable` does not support"):
        getattr(triton_optim, name)([Parameter(torch.ones(1))], capturable=True, **kwargs)


def test_a_graph_of_parameters_on_the_cpu() -> None:
    optimizer = triton_optim.SGD([Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(RuntimeError, match="parameters are on cpu, where there are no CUDA graphs"):
        triton_optim.GraphedStep(optimizer)


@pytest.mark.usefixtures("cuda")
def test_a_parameter_that_was_written_before_a_capture() -> None:
    """Its remainder is to be dropped once, and not in every replay."""
    param = new_param(5, dtype=torch.bfloat16)
    optimizer = triton_optim.SGD(
        [param], torch.tensor(1e-3), capturable=True, master_weight_bits=32
    )
    optimizer.step()
    with torch.no_grad():
        param.mul_(3)
    graph = FakeGraph()
    with (
        pytest.raises(RuntimeError, match="make a step before the capture"),
        torch.cuda.graph(graph),  # type: ignore[arg-type]
    ):
        optimizer.step()
    optimizer.step()
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        optimizer.step()
