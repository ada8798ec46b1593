"""What a kernel is compiled for, and how its tensors are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Storage dtypes; a complex tensor is stored as pairs of the real dtype beside it.
STORAGE_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}

# Bytes of an element in each format, of kernels/formats.py.
ITEM_SIZES = {n: d.itemsize for d, n in STORAGE_DTYPES.items() if not d.is_complex}
ITEM_SIZES |= {"bfloat16_stochastic": 2, "float16_stochastic": 2, "bfloat16_remainder": 4}
ITEM_SIZES |= {"float8_e5m3": 1, "float8_e4m3": 1}  # and a byte for each group
STOCHASTIC = frozenset(name for name in ITEM_SIZES if name.endswith("_stochastic") or "8_" in name)


class Variant(NamedTuple):
    """What a compiled kernel depends on: never a size, a count, a rate or a step."""

    flags: frozenset[str]
    param_dtype: str  # with its format, as those of states
    grad_dtype: str
    state_dtypes: tuple[str, ...]
    aligned: bool
    reads_step: bool
    conditions: frozenset[str] = frozenset()  # see StepConditions.enabled
    sharding: int = 0  # see kernels/random_bits.py

    @property
    def all_flags(self) -> frozenset[str]:
        return self.flags | ({"APPROXIMATE"} if self.is_approximate else frozenset())

    @property
    def n_states(self) -> int:
        return len(self.state_dtypes)

    @property
    def state_dtype(self) -> str:
        """Of all states, for tables: the parameter's dtype where there is none."""
        return "+".join(dict.fromkeys(self.state_dtypes)) or self.param_dtype

    @property
    def written(self) -> tuple[str, ...]:
        """Formats of the parameter and its states."""
        return self.param_dtype, *self.state_dtypes

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded stochastically."""
        return not STOCHASTIC.isdisjoint(self.written)

    @property
    def is_approximate(self) -> bool:
        """Whether everything that is written is rounded so."""
        return STOCHASTIC.issuperset(self.written)

    @property
    def has_formats(self) -> bool:
        """Whether anything is stored in another format than a dtype of torch."""
        return any("_" in name for name in self.written)

    @property
    def bytes_per_element(self) -> int:
        """The gradient read once, parameter and state read once and written once.

        And the gradient written once, where it is unscaled.
        """
        grads = 2 if "UNSCALE" in self.conditions else 1
        written = sum(ITEM_SIZES[name] for name in self.written)
        return 2 * written + grads * ITEM_SIZES[self.grad_dtype]

    @property
    def may_skip(self) -> bool:
        """Whether the kernel may find that the step does not happen."""
        return not self.conditions.isdisjoint(("FOUND_INF", "SKIP_NONFINITE"))

    @property
    def has_groups(self) -> bool:
        """Whether some state is of 8 bits, with exponents of groups."""
        return any(name.startswith("float8") for name in self.written)

    @property
    def half(self) -> bool:
        """Whether no tensor is of 32 bits or more."""
        names = (*self.written, self.grad_dtype)
        return all(name.startswith(("bfloat16", "float16", "float8")) for name in names)


class GradVariant(NamedTuple):
    """What a compiled kernel over gradients alone depends on."""

    dtype: str
    aligned: bool
