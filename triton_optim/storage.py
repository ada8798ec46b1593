"""How an optimizer stores parameters and state where that is not as torch does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

REMAINDER = "param_remainder"  # a state: int16, what a bfloat16 parameter lacks of a float32
HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
EIGHT_BITS = torch.uint8  # what "8bit" is kept in; see kernels/float8.py
EXPONENTS = "_exponents"  # after a state's name: uint8, of its groups
STATE_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16, "8bit": EIGHT_BITS}  # fmt: skip

StateDtype = torch.dtype | str


class StorageOptions:
    """What follows from those of `Options` that say how parameters and state are stored."""

    master_weight_bits: int | None
    stochastic_rounding: bool | None
    rounding_seed: int
    state_dtype: StateDtype | Mapping[str, StateDtype] | None

    def check_storage(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            TypeError: `rounding_seed` is no int.
            ValueError: an invalid value, or options that exclude each other.
        """
        if self.master_weight_bits not in (None, 32):
            raise ValueError(
                f"Invalid master_weight_bits value: {self.master_weight_bits!r}; 32 keeps float32 "
                "values of bfloat16 parameters, None does not"
            )
        if self.master_weight_bits and self.stochastic_rounding:
            raise ValueError(
                "master_weight_bits=32 rounds no parameter, and stochastic_rounding=True asks for "
                "it; choose. State of 16 bits that state_dtype asks for is rounded stochastically "
                "without being told"
            )
        if not isinstance(self.rounding_seed, int) or isinstance(self.rounding_seed, bool):
            raise TypeError(f"rounding_seed is {self.rounding_seed!r}; give an int")
        if not -(2**63) <= self.rounding_seed < 2**63:
            raise ValueError(f"rounding_seed={self.rounding_seed} has more than 64 bits")
        if self.rounding_seed and not self.may_round:
            raise ValueError(
                f"rounding_seed={self.rounding_seed}, but nothing is rounded stochastically; give "
                "stochastic_rounding=True, or leave it out"
            )
        if isinstance(self.state_dtype, Mapping):
            self.state_dtype = dict(self.state_dtype)  # the caller's may change
        for dtype in self._given_dtypes:
            if not isinstance(dtype, str | torch.dtype) or dtype not in STATE_DTYPES:
                names = ", ".join(map(repr, STATE_DTYPES))
                raise ValueError(f"Invalid state_dtype value: {dtype!r}; give one of {names}")
        if self.stochastic_rounding is False and "8bit" in self._given_dtypes:
            raise ValueError(
                "stochastic_rounding=False, and state_dtype asks for 8 bits, which lose all small "
                "updates without it; leave it out, or ask for bfloat16"
            )

    @property
    def _given_dtypes(self) -> Collection[StateDtype]:
        if isinstance(self.state_dtype, Mapping):
            return self.state_dtype.values()
        return () if self.state_dtype is None else (self.state_dtype,)

    @cached_property
    def may_round(self) -> bool:
        """Whether anything may be rounded stochastically: then every step is counted."""
        if self.stochastic_rounding is None:
            return not {"8bit", *HALF_DTYPES}.isdisjoint(self._given_dtypes)
        return self.stochastic_rounding

    @property
    def has_eight_bits(self) -> bool:
        return "8bit" in self._given_dtypes

    def keeps_remainder(self, param: Tensor) -> bool:
        """Whether a parameter has float32 values, of which the state has a part."""
        return self.master_weight_bits is not None and param.dtype == torch.bfloat16

    def dtype_of(self, name: str, param: Tensor) -> torch.dtype | None:
        """That in which a state is kept; None: the parameter's, or what was loaded."""
        if name == REMAINDER:
            return torch.int16
        given = self.state_dtype
        asked = given.get(name) if isinstance(given, Mapping) else given
        if asked is None:
            return torch.float32 if self.keeps_remainder(param) else None
        return STATE_DTYPES[asked]

    def names_beside(self, param: Tensor, names: Iterable[str]) -> tuple[str, ...]:
        """Names of what is kept beside a parameter and states of these names: see kernels."""
        dtypes = {name: self.dtype_of(name, param) for name in names}
        exponents = (name + EXPONENTS for name, dtype in dtypes.items() if dtype == EIGHT_BITS)
        return (*((REMAINDER,) if self.keeps_remainder(param) else ()), *exponents)

    def rounds_param(self, param: Tensor) -> bool:
        """Whether a parameter is rounded stochastically."""
        return bool(self.stochastic_rounding) and param.dtype in HALF_DTYPES

    def rounds_state(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a state that is kept in this dtype is rounded stochastically."""
        if dtype == EIGHT_BITS:
            return True
        asked = (
            name in self.state_dtype if isinstance(self.state_dtype, Mapping) else self.state_dtype
        )
        rounds = asked if self.stochastic_rounding is None else self.stochastic_rounding
        return bool(rounds) and dtype in HALF_DTYPES

    def beyond_torch(self, param: Tensor, names: Iterable[str], *, by_rows: bool) -> str | None:
        """The option for which a parameter with these states needs the dense kernels, or None.

        Args:
            by_rows: whether kernels that update rows are to step it; otherwise torch.
        """
        if self.keeps_remainder(param):
            return "master_weight_bits=32"
        if self.rounds_param(param):
            return "stochastic_rounding=True"
        dtypes = {name: self.dtype_of(name, param) or param.dtype for name in names}
        if any(self.rounds_state(name, dtype) for name, dtype in dtypes.items()):
            return f"state_dtype={self.state_dtype}" if self.state_dtype else "stochastic_rounding"
        plain = len({*dtypes.values()}) < 2 if by_rows else {*dtypes.values()} <= {param.dtype}
        return None if plain else f"state_dtype={self.state_dtype}"

    def check_params(self, params: Iterable[Tensor]) -> None:
        """Refuse parameters that cannot be stored so."""
        for position, param in enumerate(params):
            where = f"parameter {position} of the group is {param.dtype}"
            if self.master_weight_bits and param.dtype == torch.float16:
                raise ValueError(
                    f"{where}, and master_weight_bits=32 takes bfloat16: 16 bits beside a float16 "
                    "do not tell all float32 values apart; convert it, or give "
                    "stochastic_rounding=True"
                )
            if self.state_dtype is not None and param.is_complex():
                raise ValueError(f"{where}; state_dtype takes real ones: leave it out")

    def check_used(self, params: Iterable[Tensor], names: Collection[str]) -> None:
        """Refuse options that do nothing for these parameters and states, of these names."""
        dtypes = {param.dtype for param in params}
        if not dtypes:  # of one process of several
            return
        if isinstance(self.state_dtype, Mapping) and (unknown := {*self.state_dtype} - {*names}):
            raise ValueError(
                f"state_dtype names {sorted(unknown)[0]!r}, and the state has {sorted(names)}"
            )
        if self.state_dtype is not None and not names:
            raise ValueError(
                f"state_dtype={self.state_dtype}, but these options keep no state; leave it out"
            )
        if self.master_weight_bits and torch.bfloat16 not in dtypes:
            raise ValueError(
                "master_weight_bits=32, but no parameter is bfloat16: float32 ones are exact "
                "without it; leave it out, or convert the model with .to(torch.bfloat16)"
            )
        if self.stochastic_rounding and HALF_DTYPES.isdisjoint({*dtypes, *self._given_dtypes}):
            raise ValueError(
                "stochastic_rounding=True, but no parameter is bfloat16 or float16, nor does "
                "state_dtype ask for either; leave it out, or convert the model with "
                ".to(torch.bfloat16)"
            )
