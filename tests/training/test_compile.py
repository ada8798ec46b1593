"""Training under `torch.compile`: the program breaks at the step, and is compiled once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE, STATEFUL_CASES, TORCH, Case, every_state
from paired_optimizers import Pair
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import Linear, Sequential, Tanh
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

import triton_optim
from triton_optim.launch.launcher import record_launches

pytestmark = [  # of torch: it hides the first itself, but not from an error
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

STEPS = 20
Train = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _once() -> Iterator[None]:
    """What compiles a second time is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def _exponential(optimizer: Optimizer) -> Any:
    return ExponentialLR(optimizer, 0.9)


def _one_cycle(optimizer: Optimizer) -> Any:
    """With momentum, it changes that too."""
    momentum = optimizer.defaults.get("momentum", 0) != 0
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1, cycle_momentum=momentum)


class Program:
    """A small regression, and a function that trains it by a step."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        layers = Sequential(Linear(4, 8), Tanh(), Linear(8, 2))
        self.model: Any = layers.to(DEVICE, torch.float64)
        self.optimizer: Any = case.ours(self.model.parameters())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = mse_loss(self.model(x), y)
        loss.backward()
        return loss

    def train(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(x, y)
        self.optimizer.step()
        return loss

    def train_by_closure(self, x: Tensor, y: Tensor) -> Any:
        return self.optimizer.step(lambda: self.loss(x, y))

    def run(self, train: Train, scheduler: Any = None) -> list[Any]:
        """Returns the losses and the parameters."""
        generator = torch.Generator().manual_seed(0)
        losses, frames = [], set()
        with record_launches() as launches:
            for _ in range(STEPS):
                data = torch.randn(16, 6, dtype=torch.float64, generator=generator).to(DEVICE)
                losses.append(train(data[:, :4], data[:, 4:]).detach())
                if scheduler is not None:
                    scheduler.step()
                frames.add(counters["frames"]["total"])
        assert len(launches) == STEPS
        assert len(frames) == 1, "compiled after the first step"
        return [*losses, *self.model.parameters()]


def _check(case: Case, backend: str, schedule: Callable[[Optimizer], Any]) -> None:
    """Compiled and not, a program trains alike."""
    plain, program = Program(case), Program(case)
    scheduler = schedule(program.optimizer)
    compiled = program.run(torch.compile(program.train, backend=backend), scheduler)
    assert counters["stats"]["unique_graphs"] == 1  # forward, loss and backward
    expected = plain.run(plain.train, schedule(plain.optimizer))
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-9)


@every_state
@pytest.mark.parametrize(
    ("backend", "schedule"),
    [("eager", _exponential), ("eager", _one_cycle), ("aot_eager", _one_cycle)],
)
def test_a_training_step_is_compiled_once(
    case: Case, backend: str, schedule: Callable[[Optimizer], Any]
) -> None:
    _check(case, backend, schedule)


@pytest.mark.skipif(
    DEVICE == "cpu" and not shutil.which("g++"), reason="inductor needs a C++ compiler"
)
@pytest.mark.skipif(TORCH < (2, 8), reason="warns of its own code")
def test_by_inductor() -> None:
    _check(STATEFUL_CASES[-1], "inductor", _exponential)


@every_state
def test_a_compiled_step(case: Case) -> None:
    pair = Pair(case)
    steps: list[Any] = [optimizer.step for optimizer in pair.optimizers]
    steps[0] = torch.compile(steps[0], backend="eager")
    for i in range(STEPS):
        for optimizer, tensors, step in zip(pair.optimizers, pair.tensors, steps, strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            tensors.new_gradients()
            step()
        pair.check()


@every_state
def test_a_step_with_a_closure(case: Case) -> None:
    plain, program = Program(case), Program(case)
    compiled = program.run(torch.compile(program.train_by_closure, backend="eager"))
    torch.testing.assert_close(compiled, plain.run(plain.train), rtol=0, atol=0)


def test_a_compiled_model_stays_compiled_in_a_closure() -> None:
    program = Program(STATEFUL_CASES[0])
    program.model = torch.compile(program.model, backend="eager")
    program.run(program.train_by_closure)
    assert counters["stats"]["unique_graphs"] == 1


def test_hooks_of_a_step_are_not_compiled() -> None:
    """They change what they see, which a compiled one would be compiled anew for."""
    program, calls = Program(STATEFUL_CASES[0]), list[str]()
    program.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    program.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    program.run(torch.compile(program.train, backend="eager"))
    assert calls == ["pre", "post"] * STEPS


def test_many_optimizers_in_a_compiled_program() -> None:
    """A step that were compiled would be once for each of them: Dynamo gives up after eight."""
    params = [torch.ones(3, device=DEVICE, requires_grad=True) for _ in range(12)]
    optimizers = [triton_optim.SGD([param], lr=0.5) for param in params]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    for param in params:
        param.grad = torch.ones_like(param)
    torch.compile(step, backend="eager")()
    for param in params:
        assert torch.equal(param, torch.full_like(param, 0.5))
