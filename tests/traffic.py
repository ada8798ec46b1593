"""Counts what interpreted kernels load and store: all of it passes the two methods below."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


class Traffic:
    """Bytes since the start."""

    loaded = 0
    stored = 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """The traffic of the kernels that run meanwhile."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        element_bits = pointers.get_element_ty().primitive_bitwidth
        return int(np.count_nonzero(mask.data) * element_bits // 8)

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *args)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *args)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
