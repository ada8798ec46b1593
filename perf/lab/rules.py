"""What is stepped: update rules, and the dtypes of parameters and state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


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
    # All of it given, since defaults differ between packages.
    Rule(
        "adamw",
        "AdamW",
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
        ("exp_avg", "exp_avg_sq"),
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
