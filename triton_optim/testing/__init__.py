"""Checks an optimizer built on `FusedOptimizer` against its reference: one line of a test.

May use all of the package but single optimizers.
"""

from .check import check

__all__ = ["check"]
