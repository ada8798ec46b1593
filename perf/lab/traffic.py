"""What interpreted kernels load and store: all of it passes the two methods below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


class Access(NamedTuple):
    """One load or store of one program, masked elements left out."""

    stores: bool
    addresses: np.ndarray[Any, np.dtype[np.uint64]]
    element_size: int  # bytes

    @property
    def n_bytes(self) -> int:
        return self.addresses.size * self.element_size


@contextmanager
def watched(watch: Callable[[Access], None]) -> Iterator[None]:
    """Call `watch` before every load and store of the kernels that run meanwhile."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def access(stores: bool, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        watch(Access(stores, pointers.data[mask.data], size))

    def watched_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        access(False, pointers, mask)
        return load(self, pointers, mask, *args)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        access(True, pointers, mask)
        return store(self, pointers, value, mask, *args)

    InterpreterBuilder.create_masked_load = watched_load
    InterpreterBuilder.create_masked_store = watched_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


class Traffic:
    """Bytes since the start."""

    loaded = 0
    stored = 0

    def count(self, access: Access) -> None:
        if access.stores:
            self.stored += access.n_bytes
        else:
            self.loaded += access.n_bytes
