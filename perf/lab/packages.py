"""The optimizers of other packages: how they are built, and why one does not stand for a rule."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lab.implementations import Rule, Storage

Build = Callable[["Rule", list[Parameter]], Optimizer]
Refusal = Callable[["Rule", "Storage"], str | None]


def from_module(module: str, prefix: str = "", **extra: Any) -> Build:
    """Builds the class of torch's arguments, and of its name behind `prefix`, in `module`."""

    def build(rule: Rule, params: list[Parameter]) -> Optimizer:
        make = getattr(import_module(module), prefix + rule.optimizer)
        optimizer: Optimizer = make(params, **rule.kwargs, **extra)
        return optimizer

    return build


def parameters_dtype(name: str, *optimizers: str) -> Refusal:
    """Of a package that has these of torch's classes, with state in the parameter's dtype."""

    def refusal(rule: Rule, storage: Storage) -> str | None:
        if rule.optimizer not in optimizers:
            return f"{name} has no {rule.optimizer}"
        same = storage.param == storage.state
        return None if same else f"{name}'s state has its parameter's dtype"

    return refusal


def apex(rule: Rule, storage: Storage) -> str | None:
    """NVIDIA's apex of July 2026, commit 6424da3.

    It is built from source: PyPI's `apex` is another package. State has torch's names; SGD has a
    buffer of momentum, which it reads, without momentum too.
    """
    refusal = parameters_dtype("apex", "SGD", "Adagrad")(rule, storage)
    if refusal is None and storage.param != torch.float32:
        skips = "skips it without a word" if rule.optimizer == "SGD" else "raises"
        return f"apex has no kernel for bfloat16 and {skips}"
    return refusal


def transformer_engine(rule: Rule, storage: Storage) -> str | None:
    """TransformerEngine 2.20.2, whose FusedSGD is apex's; its other fused optimizer is Adam."""
    refusal = parameters_dtype("TransformerEngine", "SGD")(rule, storage)
    if refusal is None and storage.param != torch.float32:
        return "TransformerEngine has no kernel for bfloat16 and skips it without a word"
    return refusal


def build_heavyball(rule: Rule, params: list[Parameter]) -> Optimizer:
    """HeavyBall 3.2.1's SGD, which it compiles for lists of tensors.

    It has state without momentum too, rounds bfloat16 parameters at random, and leaves the momentum
    in the gradients. These are kept for the next step, where it would drop them.
    """
    make = import_module("heavyball").SGD
    momentum = rule.kwargs.get("momentum", 0.0)
    optimizer: Optimizer = make(params, lr=rule.kwargs["lr"], beta=momentum, consume_grad=False)
    return optimizer


def heavyball(rule: Rule, storage: Storage) -> str | None:
    if rule.optimizer == "RMSprop":
        return "HeavyBall's RMSprop corrects its bias, which is another rule"
    if rule.optimizer != "SGD":
        return f"HeavyBall has no {rule.optimizer}"
    return None if storage.state == torch.float32 else "HeavyBall keeps float32 state by default"


def build_flash(rule: Rule, params: list[Parameter]) -> Optimizer:
    """FlashOptim's SGD without its 8-bit state and 24-bit weights, which are other storage."""
    make = import_module("flashoptim").FlashSGD
    optimizer: Optimizer = make(params, **rule.kwargs, quantize=False, master_weight_bits=None)
    return optimizer


def bitsandbytes(rule: Rule, storage: Storage) -> str | None:
    if rule.name == "sgd":
        return "bitsandbytes refuses SGD without momentum"
    if rule.name == "rmsprop-cm":
        return "bitsandbytes refuses centered and ignores RMSprop's momentum"
    return None if storage.state == torch.float32 else "bitsandbytes keeps float32 state"
