"""Flags of rules: names that a rule asks for at compile time, bits of the constexpr FLAGS."""

import triton.language as tl

BITS: dict[str, int] = {}


def flag(name):
    """A flag for use in a rule as `if NAME & FLAGS:`. The same name gives the same flag."""
    return tl.constexpr(BITS.setdefault(name, 1 << len(BITS)))
