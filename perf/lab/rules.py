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
# Of rules over dense gradients, as READMEs name them.
TITLES = {
    "sgd": "SGD",
    "momentum": "SGD, momentum",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "rmsprop-cm": "RMSprop, centered, momentum",
    "adamw": "AdamW",
}
# Of embedding tables with sparse gradients.
ROWWISE = Rule("rowwise-adagrad", "RowwiseAdagrad", {"lr": 0.1}, (), 1)
LAZY_RMSPROP = Rule("rmsprop-lazy", "RMSprop", {"lr": 0.01}, ("square_avg",), 1)
EMBEDDING_RULES = (ADAGRAD, ROWWISE, LAZY_RMSPROP, SGD)


class Storage(NamedTuple):
    """Dtypes of parameters with their gradients, and of state.

    `options` ask an optimizer of ours for it, and nobody else has it; then `remainder` bytes more
    are kept of a parameter.
    """

    name: str
    param: torch.dtype
    state: torch.dtype
    options: tuple[tuple[str, Any], ...] = ()
    remainder: int = 0


STORAGES = (
    Storage("float32", torch.float32, torch.float32),
    Storage("bfloat16", torch.bfloat16, torch.bfloat16),
    Storage("bfloat16+float32", torch.bfloat16, torch.float32),
)
BF16, EXACT = torch.bfloat16, ("master_weight_bits", 32)
FORMATS = (
    Storage("exact", BF16, torch.float32, (EXACT,), 2),
    Storage("exact16", BF16, BF16, (EXACT, ("state_dtype", BF16)), 2),
    Storage("stochastic", BF16, BF16, (("stochastic_rounding", True),)),
    Storage("8bit", BF16, torch.uint8, (EXACT, ("state_dtype", "8bit")), 2),
)
ALL_STORAGES = {storage.name: storage for storage in (*STORAGES, *FORMATS)}


def bytes_per_param(rule: Rule, storage: Storage) -> int:
    """What a step must move: gradient read, parameter and state read and written, each once."""
    written = storage.param.itemsize + storage.remainder + len(rule.states) * storage.state.itemsize
    return storage.param.itemsize + 2 * written


def bytes_kept(rule: Rule, storage: Storage) -> int:
    """What a parameter takes: itself, its gradient, its state."""
    states = len(rule.states) * storage.state.itemsize
    return 2 * storage.param.itemsize + storage.remainder + states
