"""All programs of a launch, in one order after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from .access import Access, Fault
from .floats import Array
from .global_memory import GlobalMemory, Spans, Written, put, same
from .integers import UNSIGNED
from .operands import SHARED_START
from .operations import FLOATS
from .parser import bits_of
from .program import Code, Program
from .races import Race, contested
from .shared_memory import SharedMemory

Grid = tuple[int, int, int]
ORDERS = ("ascending", "descending", "random", "interleaved")
AT_ONCE = 16  # programs that are interleaved


class Run(NamedTuple):
    """What came of all programs in one order."""

    memory: GlobalMemory
    programs: list[Program]
    written: Written


class Launch:
    """
    Args:
        code: the kernel.
        grid: how many programs, by dimension.
        arguments: numbers, pointers among them.
        shared_bytes: that each program has.
        readable, writable: global memory.
        seed: of what registers and shared memory hold at first, and of random orders.
    """

    def __init__(
        self,
        code: Code,
        grid: Grid,
        arguments: Sequence[int | float],
        shared_bytes: int,
        readable: Spans,
        writable: Spans,
        seed: int = 0,
    ) -> None:
        self._code, self._grid, self._shared_bytes = code, grid, shared_bytes
        self._readable, self._writable = readable, writable
        self._rng = np.random.default_rng(seed)
        self._arguments = {
            name: _bits(value, kind, code.kernel.n_threads)
            for (name, kind), value in zip(code.kernel.params, arguments, strict=True)
        }

    def run(self, watch: Callable[[Access], None] | None = None) -> Run:
        """Run all programs. What they wrote stays; of a launch with a fault, nothing.

        Raises:
            Fault: see `attempt`.
        """
        run = self.attempt(watch)
        put(run.written)
        return run

    def attempt(self, watch: Callable[[Access], None] | None = None) -> Run:
        """Run in ascending order; in others too, where two programs touch the same memory.

        Nothing of what the ascending order wrote stays.

        Raises:
            Fault: an access that is none of this launch's, misaligned or unordered; shared memory
                that is used before it is set; programs that write other bits in another order.
        """
        first = self._in_order("ascending", watch=watch)
        found = contested(first.memory.log)
        self._judge(found.races, first)
        orders = list(ORDERS[1:]) if found.by_programs else []
        if not orders and any(program.shared.unset_loads for program in first.programs):
            orders = ["descending"]  # with other noise
        for order in orders:
            if not same(self._in_order(order).written, first.written):
                raise Fault(f"other bits where programs run in {order} order than ascending")
        return first

    def _judge(self, races: Sequence[Race], first: Run) -> None:
        """
        Raises:
            Fault: a race, unless it is a load of which nothing depends.
        """
        spoiled: dict[tuple[int, int], list[int]] = {}
        for race in races:
            if race.load is None:
                raise Fault(str(race))
            key = (race.load.program, race.load.access.instruction.line)
            spoiled.setdefault(key, []).append(race.load.thread)
        if races:
            again = GlobalMemory(self._readable, self._writable, spoiled=spoiled)
            if not same(self._in_order("ascending", again).written, first.written):
                raise Fault(str(races[0]))

    def _in_order(
        self,
        order: str,
        memory: GlobalMemory | None = None,
        watch: Callable[[Access], None] | None = None,
    ) -> Run:
        """Run all programs, and undo what they wrote."""
        memory = memory or GlobalMemory(self._readable, self._writable, watch)
        x, y, z = self._grid
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        if order == "descending":
            indices.reverse()
        elif order != "ascending":
            indices = [indices[i] for i in self._rng.permutation(len(indices))]
        registers = {
            **self._code.noise(self._rng), **self._code.constants, **self._arguments
        }  # fmt: skip
        programs: list[Program] = []

        def started(index: Grid) -> Iterator[None]:
            shared = SharedMemory(self._shared_bytes, SHARED_START, self._code.grain, self._rng)
            programs.append(Program(self._code, index, self._grid, registers, memory, shared))
            return programs[-1].run()

        try:
            with np.errstate(all="ignore"):
                self._exhaust(map(started, indices), AT_ONCE if order == "interleaved" else 1)
            written = memory.written()
        finally:
            memory.roll_back()
        return Run(memory, programs, written)

    def _exhaust(self, programs: Iterator[Iterator[None]], at_once: int) -> None:
        """Run programs to their end; of `at_once`, each block is a random one's."""
        running = [*islice(programs, at_once)]
        while running:
            i = int(self._rng.integers(len(running))) if at_once > 1 else 0
            if next(running[i], running) is running:
                running.pop(i)
                running += islice(programs, 1)


def _bits(value: int | float, kind: str, n_threads: int) -> Array:
    """An argument, as every thread's register has it."""
    if kind[0] == "f":
        number: Array = np.full(n_threads, value, FLOATS[kind])
        return number.view(UNSIGNED[bits_of(kind)])
    return np.full(n_threads, int(value) % 2 ** bits_of(kind), UNSIGNED[bits_of(kind)])
