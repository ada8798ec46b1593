"""How often each parameter was updated: counted in the `step` tensors that its state holds."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from ..launch import backend
from ..launch.kernel_args import Tables
from ..launch.launcher import Launch
from ..launch.pointer_tables import as_tensor, column, on_device
from ..launch.row_launcher import dtype_name
from ..scalar_state import ScalarState
from ..tensors.layout import picker

if backend.DEVICE_TYPE:
    from ..kernels.counts import count_kernel

COUNT_BLOCK = 256  # steps that a program of the kernel counts


class _Memory(bytearray):
    """Bytes that can be referred to weakly."""


class StepPool:
    """Makes step counters on the CPU that lie side by side, so that one operation counts many.

    Each is a tensor with a storage of its own size: saved or copied, it takes what torch's takes.
    Their memory is free when the last of them is, but for that of the next ones.
    """

    def __init__(self) -> None:
        self._next: dict[torch.dtype, tuple[_Memory, int]] = {}  # where the next one will lie
        self._memories: list[tuple[weakref.ref[_Memory], torch.dtype]] = []

    def take(self, dtype: torch.dtype, expected: Callable[[], int]) -> Tensor:
        """A counter at 0: [].

        Args:
            dtype: float32 or float64.
            expected: how many will be asked for, which will lie side by side.
        """
        memory, place = self._next.get(dtype, (_Memory(), 0))
        if place == len(memory):
            memory, place = _Memory(dtype.itemsize * max(expected(), 1)), 0
            self._memories = [item for item in self._memories if item[0]() is not None]
            self._memories.append((weakref.ref(memory), dtype))
        self._next[dtype] = memory, place + dtype.itemsize
        # in place, so that it is no view
        return torch.frombuffer(memory, dtype=dtype, count=1, offset=place).squeeze_(0)

    def packs(self) -> list[Tensor]:
        """All counters that lie side by side, as tensors of one dim."""
        live = [(memory(), dtype) for memory, dtype in self._memories]
        return [torch.frombuffer(m, dtype=dtype) for m, dtype in live if m is not None]


class HostCounts:
    """Counts on the CPU: one operation for all counters of a pool, and slowly any other.

    Args:
        steps: a counter a tensor, [] or of one element. They are not kept.
        pool: where some of them may be from.
    """

    def __init__(self, steps: Sequence[Tensor], pool: StepPool) -> None:
        places = {step.data_ptr(): i for i, step in enumerate(steps)}
        # all counters, indices of ours, as many ones, and what picks ours of those here
        self._packs: list[tuple[Tensor, Tensor, Tensor, Callable[[Sequence[Any]], Any]]] = []
        order: list[int] = []
        for pack in pool.packs():
            start, stop = pack.data_ptr(), pack.data_ptr() + pack.nbytes
            found = [(a, i) for a, i in places.items() if start <= a < stop]
            if found:
                at = [(address - start) // pack.element_size() for address, _ in found]
                indices, rows = torch.tensor(at, device="cpu"), [i for _, i in found]
                ones = torch.ones_like(indices, dtype=pack.dtype)
                self._packs.append((pack, indices, ones, picker(rows)))
                order += rows
        self._others = sorted(set(range(len(steps))) - set(order))
        order += self._others
        self._in_order = picker(sorted(range(len(order)), key=order.__getitem__))

    def values(self, steps: Sequence[Tensor]) -> Sequence[float]:
        """What the counters hold, one after another."""
        ours = (pack.index_select(0, indices).tolist() for pack, indices, *_ in self._packs)
        others = (float(steps[i]) for i in self._others)
        values: Sequence[float] = self._in_order([*chain.from_iterable(ours), *others])
        return values

    def add(self, steps: Sequence[Tensor], present: bytes | None) -> None:
        """Count an update of each tensor, or of those whose byte in `present` is 1."""
        for pack, indices, ones, pick in self._packs:
            if present is not None:
                typecode = "d" if pack.dtype == torch.float64 else "f"
                ones = torch.frombuffer(array(typecode, [*pick(present)]), dtype=pack.dtype)
            pack.index_add_(0, indices, ones)
        if others := [steps[i] for i in self._others if present is None or present[i]]:
            torch._foreach_add_(others, 1)

    def set(self, steps: Sequence[Tensor], values: Sequence[float]) -> None:
        """Let each hold its value."""
        for pack, indices, _, pick in self._packs:
            typecode = "d" if pack.dtype == torch.float64 else "f"
            new = torch.frombuffer(array(typecode, pick(values)), dtype=pack.dtype)
            pack.index_copy_(0, indices, new)
        for i in self._others:
            steps[i].fill_(values[i])


class SeenCounts:
    """For a rule that must know a tensor's first update and whose state has no counter.

    Args:
        seen: which tensors were updated before.
    """

    def __init__(self, seen: Sequence[bool]) -> None:
        self._seen, self._all = bytes(seen), bytes(repeat(1, len(seen)))

    def values(self, steps: Sequence[Tensor]) -> Sequence[float]:
        """0 of a tensor that was never updated, or 1."""
        return [*map(float, self._seen)]

    def add(self, steps: Sequence[Tensor], present: bytes | None) -> None:
        if present is None:
            self._seen = self._all
        elif 0 in self._seen:
            self._seen = bytes(a | b for a, b in zip(self._seen, present, strict=True))


class DeviceCounts:
    """Counts where the parameters are, in one launch that reads there whether the step is taken.

    It runs before the update, and tells it what the counters held.

    Args:
        steps: a counter a tensor, on one device and of one dtype. They are not kept. With
            `scalars`, each of these of every tensor follows.
        device: theirs.
        reads: whether the update reads them.
        scalars: the rule's.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        device: torch.device,
        *,
        reads: bool,
        scalars: ScalarState | None = None,
    ) -> None:
        self._scalars, columns = scalars, 1 if scalars is None else scalars.reads + 1
        self._n = len(steps) if scalars is None else len(steps) // (1 + len(scalars.names))
        self._dtype, self._scalar_dtype = steps[0].dtype, steps[-1].dtype
        addresses = column("q", [step.data_ptr() for step in steps])
        self._addresses = on_device(as_tensor(addresses), device)
        n = self._n * columns
        self.column = torch.empty(n, dtype=torch.float64, device=device) if reads else None

    def read(self, steps: Sequence[Tensor]) -> None:
        """Tell the update what the counters hold, and count nothing."""
        if self.column is not None:
            self.column.copy_(torch.stack([step.view(()) for step in steps]))

    def launch(self, grads: Tensor, enabled: frozenset[str], tables: Tables) -> Launch:
        """Compile the launch of a step under these conditions.

        `grads` is int64 [tensors, columns], of which the last is a gradient's address, or 0.
        """
        scalars = self._scalars
        arguments = {
            "steps_ptr": self._addresses,
            "grads_ptr": grads,
            "column_ptr": self.column,
            "tensor_table_ptr": tables.rows if scalars else None,
            "hyperparameters_ptr": tables.hypers if scalars else None,
            "found_inf_ptr": tables.step_status if "FOUND_INF" in enabled else None,
            "grad_norm_ptr": tables.norm if "SKIP_NONFINITE" in enabled else None,
            "n_tensors": self._n,
            "ADVANCE": scalars and scalars.kernel,
            "N_SCALARS": len(scalars.names) if scalars else 0,
            "N_HYPERS": tables.hypers.shape[1] if scalars else 0,
            "DTYPE": backend.triton_dtype(dtype_name(self._dtype)),
            "SCALAR_DTYPE": backend.triton_dtype(dtype_name(self._scalar_dtype)),
            "GRAD_COLUMNS": grads.shape[1],
            "SKIP_NONFINITE": "SKIP_NONFINITE" in enabled,
            "BLOCK_SIZE": COUNT_BLOCK,
        }
        options = {"num_warps": 4, "enable_fp_fusion": True} if backend.COMPILED else {}
        n_programs = -(-self._n // COUNT_BLOCK)
        return Launch(count_kernel, None, n_programs, arguments, options, grads.device)

    @property
    def tensors(self) -> list[Tensor]:
        """What launches use and nobody else holds."""
        return [self._addresses, *([] if self.column is None else [self.column])]
