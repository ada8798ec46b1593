"""The one table of cases: every rule, every flag, and the tensors they are tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from guarded_memory import guarded
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 1024 if backend.COMPILED else 64  # elements of a program in these tests

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

SCALARS = frozenset({"step", "mu_product", "eta", "mu"})  # state of one number a tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


class Case(NamedTuple):
    """One optimizer and its arguments."""

    name: str
    optimizer: str
    kwargs: dict[str, Any]

    def ours(self, params: Any, **kwargs: Any) -> Any:
        return getattr(triton_optim, self.optimizer)(params, **{**self.kwargs, **kwargs})

    def theirs(self, params: Any, **kwargs: Any) -> Any:
        kwargs = {"foreach": False, **self.kwargs, **kwargs}
        return getattr(torch.optim, self.optimizer)(params, **kwargs)


CASES = (
    Case("sgd", "SGD", {"lr": 0.1}),
    Case("sgd-weight_decay", "SGD", {"lr": 0.1, "weight_decay": 0.1}),
    Case("sgd-maximize", "SGD", {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    Case("sgd-momentum", "SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("sgd-dampening", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    Case("sgd-nesterov", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    Case(
        "sgd-all",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    Case("adagrad", "Adagrad", {"lr": 0.1}),
    Case("adagrad-lr_decay", "Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    Case("adagrad-weight_decay", "Adagrad", {"lr": 0.1, "weight_decay": 0.1}),
    Case("adagrad-initial", "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}),
    Case("adagrad-eps", "Adagrad", {"lr": 0.1, "eps": 0.1}),
    Case(
        "adagrad-all",
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3, "maximize": True},
    ),
    Case("rmsprop", "RMSprop", {"lr": 0.01}),
    Case("rmsprop-alpha", "RMSprop", {"lr": 0.01, "alpha": 0.9}),
    Case("rmsprop-eps", "RMSprop", {"lr": 0.01, "eps": 0.1}),
    Case("rmsprop-weight_decay", "RMSprop", {"lr": 0.01, "weight_decay": 0.1}),
    Case("rmsprop-momentum", "RMSprop", {"lr": 0.01, "momentum": 0.9}),
    Case("rmsprop-centered", "RMSprop", {"lr": 0.01, "centered": True}),
    Case(
        "rmsprop-all",
        "RMSprop",
        {
            "lr": 0.01,
            "alpha": 0.9,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "momentum": 0.9,
            "centered": True,
            "maximize": True,
        },
    ),
    Case("adam", "Adam", {"lr": 0.01}),
    Case("adam-betas", "Adam", {"lr": 0.01, "betas": (0.3, 0.99999)}),
    Case("adam-eps", "Adam", {"lr": 0.01, "eps": 0.1}),
    Case("adam-weight_decay", "Adam", {"lr": 0.01, "weight_decay": 0.1}),
    Case("adam-amsgrad", "Adam", {"lr": 0.01, "amsgrad": True}),
    Case("adamw", "AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    Case(
        "adamw-all",
        "AdamW",
        {
            "lr": 0.01,
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "weight_decay": 0.1,
            "amsgrad": True,
            "maximize": True,
        },
    ),
    Case("adamax", "Adamax", {"lr": 0.01}),
    Case(
        "adamax-all",
        "Adamax",
        {"lr": 0.01, "betas": (0.3, 0.9), "eps": 0.1, "weight_decay": 0.1, "maximize": True},
    ),
    Case("nadam", "NAdam", {"lr": 0.01}),
    Case(
        "nadam-all",
        "NAdam",
        {
            "lr": 0.01,
            "betas": (0.3, 0.99999),
            "eps": 1e-3,
            "weight_decay": 0.1,
            "momentum_decay": 2.0,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
    ),
    Case("radam", "RAdam", {"lr": 0.01, "betas": (0.9, 0.99999)}),
    Case(
        "radam-all",
        "RAdam",
        {
            "lr": 0.01,
            "betas": (0.3, 0.999),
            "eps": 1e-3,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
    ),
    Case("adadelta", "Adadelta", {"lr": 0.1}),
    Case(
        "adadelta-all",
        "Adadelta",
        {"lr": 0.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
    ),
    Case("asgd", "ASGD", {"lr": 0.1}),
    Case(
        "asgd-all",
        "ASGD",
        {
            "lr": 0.1,
            "lambd": 0.1,
            "alpha": 0.5,
            "t0": 1.0,
            "weight_decay": 0.1,
            "maximize": True,
        },
    ),
    Case("rprop", "Rprop", {"lr": 0.01}),
    Case(
        "rprop-all",
        "Rprop",
        {"lr": 0.01, "etas": (0.3, 1.5), "step_sizes": (5e-3, 0.02), "maximize": True},
    ),
)

# One of each state layout, for tests that are about the step and not about the arithmetic.
STATEFUL_CASES = tuple(
    case
    for case in CASES
    if case.name in ("sgd", "sgd-dampening", "adagrad-lr_decay", "rmsprop-all", "adamw-all")
)


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a test over cases."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


every_state = each(STATEFUL_CASES)
with_state = each(STATEFUL_CASES[1:])
with_step = each(STATEFUL_CASES[2:])
interpreted = pytest.mark.interpreted

Build = Callable[[Callable[..., Tensor]], Tensor]


class Spec(NamedTuple):
    """A parameter, and its gradient if that is laid out in another way."""

    name: str
    param: Build
    grad: Build | None = None


SPECS = (
    Spec("0-dim", lambda draw: draw()),
    Spec("one", lambda draw: draw(1)),
    Spec("empty", lambda draw: draw(0)),
    Spec("empty-2d", lambda draw: draw(0, 3)),
    Spec("block-1", lambda draw: draw(BLOCK - 1)),
    Spec("block", lambda draw: draw(BLOCK)),
    Spec("block+1", lambda draw: draw(BLOCK + 1)),
    Spec("blocks", lambda draw: draw(3 * BLOCK + 5)),
    Spec("2d", lambda draw: draw(7, 9)),
    Spec("misaligned", lambda draw: draw(BLOCK + 4)[1:], lambda draw: draw(BLOCK + 3)),
    Spec("misaligned-grad", lambda draw: draw(BLOCK + 3), lambda draw: draw(BLOCK + 4)[1:]),
    Spec("transposed", lambda draw: draw(12, 8).t(), lambda draw: draw(12, 8).t()),
    Spec(
        "channels_last",
        lambda draw: draw(2, 5, 3, 4).permute(0, 3, 1, 2),
        lambda draw: draw(2, 5, 3, 4).permute(0, 3, 1, 2),
    ),
    Spec("grad-unlike", lambda draw: draw(6, 11), lambda draw: draw(11, 6).t()),
    Spec("grad-expanded", lambda draw: draw(5, 6), lambda draw: draw(5, 1).expand(5, 6)),
)


class Tensors:
    """Parameters and gradients whose values `storage` holds exactly, kept in `dtype`.

    Two with one seed and one storage have the same values, whatever their `dtype`.
    """

    def __init__(
        self,
        storage: torch.dtype,
        dtype: torch.dtype | None = None,
        specs: Sequence[Spec] = SPECS,
        seed: int = 0,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._storage = storage
        self._dtype = dtype or storage
        self._specs = specs
        self.params = [Parameter(spec.param(self.draw)) for spec in specs]

    def draw(self, *shape: int) -> Tensor:
        kind = torch.complex128 if self._storage.is_complex else torch.float64
        values = torch.randn(shape, generator=self._generator, dtype=kind)
        return guarded(values.to(self._storage).to(self._dtype).to(DEVICE))

    def new_gradients(self) -> None:
        for spec, param in zip(self._specs, self.params, strict=True):
            param.grad = (spec.grad or spec.param)(self.draw)

    @property
    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
        for _ in range(steps):
            self.new_gradients()
            optimizer.step()


def skip_without_late_state(case: Any) -> None:
    """Of a case in which torch's optimizer gets parameters after its constructor has run."""
    if case.optimizer == "Adagrad" and TORCH < (2, 12):
        pytest.skip("torch's Adagrad makes state in its constructor alone before 2.12")


def double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def new_param(*shape: int, **kwargs: Any) -> Parameter:
    param = Parameter(guarded(torch.randn(*shape, device=DEVICE, **kwargs)))
    param.grad = torch.randn_like(param)
    return param


def grad_of(param: Tensor) -> Tensor:
    """Its gradient, which it has."""
    assert param.grad is not None
    return param.grad


def two_copies(param: Parameter) -> list[Parameter]:
    assert param.grad is not None
    twins = []
    for _ in range(2):
        twin = Parameter(param.detach().clone())
        twin.grad = param.grad.clone()
        twins.append(twin)
    return twins


def copies_of(params: Sequence[Parameter]) -> list[Parameter]:
    """With the gradients."""
    return [two_copies(param)[0] for param in params]


def main_state(case: Case) -> str:
    """The state tensor that every parameter of this optimizer has."""
    names = {"SGD": "momentum_buffer", "Adagrad": "sum", "RMSprop": "square_avg", "ASGD": "ax"}
    return names.get(case.optimizer, "exp_avg")


def as_saved(optimizer: torch.optim.Optimizer) -> None:
    """Bring scalars of torch's back to float32, which loading cast to float64 as parameters are.

    Ours stay as they were saved, so that a resumed run is the one that was interrupted.
    """
    for state in optimizer.state.values():
        state.update({name: state[name].float() for name in SCALARS & state.keys()})


def scaled_step(optimizer: Any, found_inf: float, grad_scale: float | None = None) -> None:
    """Step as GradScaler does."""
    optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale, device=DEVICE)
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale
