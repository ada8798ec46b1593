"""What is measured against what: rules, storage, and everybody's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

import triton_optim
from lab import packages

OURS = "triton_optim"
# No optimizers: what bandwidth is measured by.
COPY = "copy"
MIXED_COPY = "mixed copy"  # with the reads and writes of the step beside it
COPIES = (COPY, MIXED_COPY)

Step = Callable[[], object]


class Rule(NamedTuple):
    """An update rule: torch's class, its arguments, and the names of its state tensors.

    `row_states` more have a number a row of an embedding table.
    """

    name: str
    optimizer: str
    kwargs: dict[str, Any]
    states: tuple[str, ...]
    row_states: int = 0


# Every step moves an element by 0.05 to 0.3, which shows in bfloat16 too.
SGD = Rule("sgd", "SGD", {"lr": 0.1}, ())
ADAGRAD = Rule("adagrad", "Adagrad", {"lr": 0.1}, ("sum",))
RULES = (
    SGD,
    Rule("momentum", "SGD", {"lr": 0.1, "momentum": 0.9}, ("momentum_buffer",)),
    ADAGRAD,
    Rule("rmsprop", "RMSprop", {"lr": 0.01}, ("square_avg",)),
    Rule(
        "rmsprop-cm",
        "RMSprop",
        {"lr": 0.01, "centered": True, "momentum": 0.9},
        ("square_avg", "grad_avg", "momentum_buffer"),
    ),
)
# Of embedding tables with sparse gradients.
ROWWISE = Rule("rowwise-adagrad", "RowwiseAdagrad", {"lr": 0.1}, (), 1)
LAZY_RMSPROP = Rule("rmsprop-lazy", "RMSprop", {"lr": 0.01}, ("square_avg",), 1)
EMBEDDING_RULES = (ADAGRAD, ROWWISE, LAZY_RMSPROP, SGD)


class Storage(NamedTuple):
    """Dtypes of parameters with their gradients, and of state."""

    name: str
    param: torch.dtype
    state: torch.dtype


STORAGES = (
    Storage("float32", torch.float32, torch.float32),
    Storage("bfloat16", torch.bfloat16, torch.bfloat16),
    Storage("bfloat16+float32", torch.bfloat16, torch.float32),
)


def bytes_per_param(rule: Rule, storage: Storage) -> int:
    """What a step must move: gradient read, parameter and state read and written, each once."""
    return 3 * storage.param.itemsize + 2 * len(rule.states) * storage.state.itemsize


def bytes_kept(rule: Rule, storage: Storage) -> int:
    """What a parameter takes: itself, its gradient, its state."""
    return 2 * storage.param.itemsize + len(rule.states) * storage.state.itemsize


class Implementation(NamedTuple):
    """Somebody's optimizers.

    `build` takes a rule, and parameters or embeddings. `refusal` says why there is nothing to
    build, or None.
    """

    name: str
    package: str  # or several, any of which has it
    build: Callable[..., Any]
    refusal: packages.Refusal
    max_tensors: int | None = None
    compiled: bool = False
    torch_state: bool = True  # torch's state names, so that all of these share their state
    step_on_gpu: bool = False  # where the step count lies
    # Of embeddings: how many times the size of the tables it keeps, state aside, and a step takes
    # besides; the rules for which a row's duplicates are not summed up first.
    tables: int = 0
    passing: int = 0
    one_by_one: tuple[str, ...] = ()

    @property
    def version(self) -> str | None:
        """The version that is installed, or None."""
        return next(filter(None, map(package_version, self.package.split())), None)

    def why_not(self, rule: Rule, storage: Storage, n_tensors: int) -> str | None:
        """Why this is not measured here, or None."""
        if self.version is None:
            return f"{' or '.join(self.package.split())} is not installed"
        if self.max_tensors is not None and n_tensors > self.max_tensors:
            return f"more than {self.max_tensors} tensors"
        return self.refusal(rule, storage)


def package_version(package: str) -> str | None:
    """The version that is installed, or None."""
    if package == OURS:  # a checkout need not be installed
        return triton_optim.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _anything(rule: Rule, storage: Storage) -> str | None:
    return None


def _torch(rule: Rule, storage: Storage) -> str | None:
    same = storage.param == storage.state
    return None if same else "torch's state has its parameter's dtype"


def _torch_fused(rule: Rule, storage: Storage) -> str | None:
    if rule.optimizer == "RMSprop":
        return "torch has no fused RMSprop"
    if rule.optimizer == "Adagrad" and _torch_release() < (2, 12):
        return "torch has a fused Adagrad on GPUs since 2.12"
    return _torch(rule, storage)


def _torch_release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


# Compile time grows with the number of tensors; beyond this it would take the whole run.
MAX_COMPILED_TENSORS = 300

IMPLEMENTATIONS = (
    Implementation(OURS, OURS, packages.from_module(OURS, fused=True), _anything),
    Implementation(
        "torch for-loop", "torch", packages.from_module("torch.optim", foreach=False), _torch
    ),
    Implementation(
        "torch foreach", "torch", packages.from_module("torch.optim", foreach=True), _torch
    ),
    Implementation(
        "torch fused",
        "torch",
        packages.from_module("torch.optim", fused=True),
        _torch_fused,
        step_on_gpu=True,
    ),
    Implementation(
        "torch compiled",
        "torch",
        packages.from_module("torch.optim"),
        _torch,
        max_tensors=MAX_COMPILED_TENSORS,
        compiled=True,
    ),
    Implementation("apex", "apex", packages.from_module("apex.optimizers", "Fused"), packages.apex),
    Implementation(
        "TransformerEngine",
        "transformer_engine",
        packages.from_module("transformer_engine.pytorch.optimizers", "Fused"),
        packages.transformer_engine,
    ),
    Implementation(
        "bitsandbytes",
        "bitsandbytes",
        packages.from_module("bitsandbytes.optim", optim_bits=32),
        packages.bitsandbytes,
        torch_state=False,
    ),
    Implementation(
        "optimi",
        "torch-optimi",
        packages.from_module("optimi", triton=True, kahan_sum=False),
        packages.parameters_dtype("optimi", "SGD"),
        torch_state=False,
    ),
    Implementation(
        "FlashOptim",
        "flashoptim",
        packages.build_flash,
        packages.parameters_dtype("FlashOptim", "SGD"),
        torch_state=False,
    ),
    Implementation(
        "HeavyBall",
        "heavyball",
        packages.build_heavyball,
        packages.heavyball,
        max_tensors=MAX_COMPILED_TENSORS,
        torch_state=False,
    ),
)
# torch's own that a user could choose instead: the best of these is what a goal compares with.
TORCH_BEST = ("torch foreach", "torch fused", "torch compiled")
