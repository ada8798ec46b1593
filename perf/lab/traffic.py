"""What interpreted kernels load and store: all of it passes the two methods below."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

Addresses = np.ndarray[Any, np.dtype[np.uint64]]
OTHER = "other"


class Access(NamedTuple):
    """One load or store of one program, masked elements left out."""

    stores: bool
    addresses: Addresses
    element_size: int  # bytes

    @property
    def n_bytes(self) -> int:
        return self.addresses.size * self.element_size


@contextmanager
def watched(watch: Callable[[Access], None]) -> Iterator[None]:
    """Call `watch` before every load and store of the kernels that run meanwhile."""

    def watching(name: str, mask: int) -> Any:
        original = getattr(InterpreterBuilder, name)

        def access(self: Any, pointers: Any, *args: Any) -> Any:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            watch(Access(mask > 0, pointers.data[args[mask].data], size))
            return original(self, pointers, *args)

        return patch.object(InterpreterBuilder, name, access)

    # After the pointers, a store's mask comes behind its value.
    with watching("create_masked_load", 0), watching("create_masked_store", 1):
        yield


class Traffic:
    """Accesses since the start, by what they are of.

    Attributes:
        tensors: those that are told apart, with what they are; the rest is `OTHER`.
    """

    def __init__(self) -> None:
        self.tensors: Sequence[tuple[str, Tensor]] = ()
        self._accesses: dict[tuple[str, bool], list[Access]] = defaultdict(list)

    def count(self, access: Access) -> None:
        if access.addresses.size:
            kind = self._kind(int(access.addresses.flat[0]))
            self._accesses[kind, access.stores].append(access)

    def _kind(self, address: int) -> str:
        for kind, tensor in self.tensors:
            if tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes:
                return kind
        return OTHER

    @property
    def loaded(self) -> int:
        return sum(
            a.n_bytes for (_, stores), of in self._accesses.items() if not stores for a in of
        )

    @property
    def stored(self) -> int:
        return sum(a.n_bytes for (_, stores), of in self._accesses.items() if stores for a in of)

    def of(self, *kinds: str) -> int:
        """Bytes loaded and stored of such tensors."""
        return sum(
            a.n_bytes for (kind, _), of in self._accesses.items() if kind in kinds for a in of
        )

    def astray(self, kind: str, stores: bool, tensor: Tensor, rows: Tensor) -> int:
        """Elements of these rows not accessed, or more than once, or accessed of other rows."""
        size, width = tensor.element_size(), tensor.numel() // len(tensor)
        places = (rows[:, None] * width + torch.arange(width)).numpy().ravel()
        expected = tensor.data_ptr() + places.astype(np.uint64) * np.uint64(size)
        seen = [access.addresses.ravel() for access in self._accesses[kind, stores]]
        found, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *seen]),
                                  return_counts=True)  # fmt: skip
        return int((counts - 1).sum()) + np.setxor1d(found, expected).size
