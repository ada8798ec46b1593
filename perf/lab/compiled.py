"""How the audit names rules and kernels, and finds the built-in ones."""

from __future__ import annotations

from collections.abc import Iterable

import triton_optim
from triton_optim.launch import backend
from triton_optim.rule import ROW_ARGUMENTS, RowWise, Rule


def built_in(name: str) -> Rule:
    """A rule as kernels know it, of the name of its function in kernels/rules.py."""
    function = getattr(backend.rules, name)
    of_rows = len(function.arg_names) == ROW_ARGUMENTS
    rules = (getattr(triton_optim, n).rule for n in triton_optim.OPTIMIZERS)
    scalars = next((rule.scalars for rule in rules if rule.function is function), None)
    return Rule(function, doubles=True, row_wise=RowWise(always=of_rows), scalars=scalars)


def rule_and_flags(rule: str, flags: Iterable[str]) -> str:
    """How reports call an update: "rmsprop CENTERED+MOMENTUM"."""
    return f"{rule.removesuffix('_rule')} {'+'.join(sorted(flags)) or '-'}"


def short(dtype: str) -> str:
    """ "f32" of "float32"; "bf16s" and "bf16r": rounded stochastically, and with a remainder."""
    named = dtype.replace("float8_", "").replace("float", "f")
    return named.replace("_stochastic", "s").replace("_remainder", "r")
