"""What is measured against what: everybody's optimizers.

Of other packages as they are in July 2026: apex 6424da3, TransformerEngine 2.20.2, HeavyBall 3.2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

import triton_optim
from lab.machine import package_version
from lab.rows import OURS
from lab.rules import Rule, Storage

Step = Callable[[], object]
Build = Callable[..., Any]
Refusal = Callable[[Rule, Storage], str | None]


class Implementation(NamedTuple):
    """Somebody's optimizers.

    `build` takes a rule, and parameters or embeddings. `refusal` says why there is nothing to
    build, or None.
    """

    name: str
    package: str  # or several, any of which has it
    build: Build
    refusal: Refusal
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
        if self.package == OURS:  # a checkout need not be installed
            return triton_optim.__version__
        return next(filter(None, map(package_version, self.package.split())), None)

    def shares_state(self, storage: Storage) -> bool:
        """Whether its state is that of all that have torch's names."""
        return self.torch_state and not storage.options

    def why_not(self, rule: Rule, storage: Storage, n_tensors: int) -> str | None:
        """Why this is not measured here, or None."""
        if self.version is None:
            return f"{' or '.join(self.package.split())} is not installed"
        if self.max_tensors is not None and n_tensors > self.max_tensors:
            return f"more than {self.max_tensors} tensors"
        if storage.options and self.package != OURS:
            return f"{self.package} has no such storage"
        return self.refusal(rule, storage)


def _from(module: str, prefix: str = "", names: Mapping[str, str] = {}, **extra: Any) -> Build:
    """Builds the class of torch's arguments in `module`.

    It has torch's name, or one of `names`, behind `prefix`.
    """

    def build(rule: Rule, params: Any) -> Optimizer:
        name = names.get(rule.optimizer, rule.optimizer)
        make = getattr(import_module(module), prefix + name)
        optimizer: Optimizer = make(params, **rule.kwargs, **extra)
        return optimizer

    return build


def _heavyball(rule: Rule, params: Any) -> Optimizer:
    """SGD, which it compiles for lists of tensors.

    It has state without momentum too, rounds bfloat16 parameters at random, and leaves the momentum
    in the gradients. These are kept for the next step, where it would drop them.
    """
    kwargs = {"lr": rule.kwargs["lr"], "beta": rule.kwargs.get("momentum", 0.0)}
    optimizer: Optimizer = import_module("heavyball").SGD(params, **kwargs, consume_grad=False)
    return optimizer


Condition = Callable[[Rule, Storage], bool]
Reason = tuple[Condition, str]


def _unless(*reasons: Reason) -> Refusal:
    """Refuses where one of these conditions holds."""
    return lambda rule, storage: next(
        (why.format(rule.optimizer) for holds, why in reasons if holds(rule, storage)), None
    )


def _rule(*names: str) -> Condition:
    """Whether the rule, or torch's class for it, is one of these."""
    return lambda rule, _: rule.name in names or rule.optimizer in names


def _no_rule(*names: str) -> Condition:
    return lambda *of: not _rule(*names)(*of)


def _both(one: Condition, other: Condition) -> Condition:
    return lambda *of: one(*of) and other(*of)


def _has(package: str, *optimizers: str) -> tuple[Reason, Reason]:
    """Of a package that has these of torch's classes, with state in the parameter's dtype."""
    return (
        (lambda rule, _: rule.optimizer not in optimizers, f"{package} has no {{}}"),
        (_other_state, f"{package}'s state has its parameter's dtype"),
    )


def _other_state(_: Rule, storage: Storage) -> bool:
    return storage.param != storage.state


def _eight_bits(_: Rule, storage: Storage) -> bool:
    return storage.state == torch.uint8


def _asks_for_state(_: Rule, storage: Storage) -> bool:
    return "state_dtype" in dict(storage.options)


def _half_param(_: Rule, storage: Storage) -> bool:
    return storage.param != torch.float32


def _half_state(_: Rule, storage: Storage) -> bool:
    return storage.state != torch.float32


def _old_adagrad(rule: Rule, _: Storage) -> bool:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return rule.optimizer == "Adagrad" and release < (2, 12)


_torch = _unless(*_has("torch", "SGD", "Adagrad", "RMSprop", "AdamW"))
# Compile time grows with the number of tensors; beyond this it would take the whole run.
MAX_COMPILED_TENSORS = 300
NO_BFLOAT16 = "{} has no kernel for bfloat16 and {}"
SKIPS = "skips it without a word"
ADAM = {"AdamW": "Adam"}  # its default is decoupled decay

IMPLEMENTATIONS = (
    Implementation(
        OURS, OURS, _from(OURS, fused=True),
        _unless(
            (_both(_rule("rmsprop-cm"), _eight_bits), "8 bits are not enough for grad_avg"),
            (_both(_rule("sgd"), _asks_for_state), "SGD without momentum keeps no state"),
        ),
        step_on_gpu=True,
    ),
    Implementation("torch for-loop", "torch", _from("torch.optim", foreach=False), _torch),
    Implementation("torch foreach", "torch", _from("torch.optim", foreach=True), _torch),
    Implementation(
        "torch fused", "torch", _from("torch.optim", fused=True),
        _unless(
            (_rule("RMSprop"), "torch has no fused RMSprop"),
            (_old_adagrad, "torch has a fused Adagrad on GPUs since 2.12"),
            *_has("torch", "SGD", "Adagrad", "AdamW"),
        ),
        step_on_gpu=True,
    ),
    Implementation(
        "torch compiled", "torch", _from("torch.optim"), _torch,
        max_tensors=MAX_COMPILED_TENSORS, compiled=True,
    ),
    # Built from source: PyPI's `apex` is another package. State has torch's names; SGD has a buffer
    # of momentum, which it reads, without momentum too.
    Implementation(
        "apex", "apex", _from("apex.optimizers", "Fused", ADAM),
        _unless(
            (_no_rule("SGD", "Adagrad", "AdamW"), "apex has no {}"),
            (_both(_rule("AdamW"), _half_state), "apex keeps Adam's state in float32"),
            (_both(_no_rule("AdamW"), _other_state), "apex's state has its parameter's dtype"),
            (_both(_rule("SGD"), _half_param), NO_BFLOAT16.format("apex", SKIPS)),
            (_both(_rule("Adagrad"), _half_param), NO_BFLOAT16.format("apex", "raises")),
        ),
    ),
    # Its FusedSGD is apex's; its FusedAdam keeps float32 state by default.
    Implementation(
        "TransformerEngine", "transformer_engine",
        _from("transformer_engine.pytorch.optimizers", "Fused", ADAM),
        _unless(
            (_no_rule("SGD", "AdamW"), "TransformerEngine has no {}"),
            (_both(_rule("AdamW"), _half_state), "TransformerEngine keeps float32 state"),
            (_both(_rule("SGD"), _half_param), NO_BFLOAT16.format("TransformerEngine", SKIPS)),
        ),
        torch_state=False,
    ),
    Implementation(
        "bitsandbytes", "bitsandbytes", _from("bitsandbytes.optim", optim_bits=32),
        _unless(
            (_rule("sgd"), "bitsandbytes refuses SGD without momentum"),
            (_rule("rmsprop-cm"), "bitsandbytes refuses centered and ignores RMSprop's momentum"),
            (_half_state, "bitsandbytes keeps float32 state"),
        ),
        torch_state=False,
    ),
    Implementation(
        "optimi", "torch-optimi", _from("optimi", triton=True, kahan_sum=False),
        _unless(*_has("optimi", "SGD", "AdamW")), torch_state=False,
    ),
    # Without its 8-bit state and 24-bit weights, which are other storage.
    Implementation(
        "FlashOptim", "flashoptim",
        _from("flashoptim", "Flash", quantize=False, master_weight_bits=None),
        _unless(*_has("FlashOptim", "SGD", "AdamW")), torch_state=False,
    ),
    Implementation(
        "HeavyBall", "heavyball", _heavyball,
        _unless(
            (_rule("RMSprop"), "HeavyBall's RMSprop corrects its bias, which is another rule"),
            (_rule("Adagrad"), "HeavyBall has no Adagrad"),
            (_rule("AdamW"), "HeavyBall's AdamW was not looked at"),
            (_half_state, "HeavyBall keeps float32 state by default"),
        ),
        max_tensors=MAX_COMPILED_TENSORS, torch_state=False,
    ),
)  # fmt: skip
