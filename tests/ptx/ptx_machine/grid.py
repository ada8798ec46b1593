"""All programs of a launch, in one order after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Launch:
    """
    Attributes:
        code: the kernel.
        grid: how many programs, by dimension.
        arguments: numbers, pointers among them.
        shared_bytes: that each program has.
        readable, writable: global memory.
        seed: of what registers and shared memory hold at first, and of random orders.
    """

    code: Code
    grid: Grid
    arguments: Sequence[int | float]
    shared_bytes: int
    readable: Spans
    writable: Spans
    seed: int = 0

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
        rng = np.random.default_rng(self.seed)
        first = self.in_order("ascending", rng, watch=watch)
        found = contested(first.memory.log)
        self._judge(found.races, first, rng)
        orders = list(ORDERS[1:]) if found.by_programs else []
        if not orders and any(program.shared.unset_loads for program in first.programs):
            orders = ["descending"]  # with other noise
        for order in orders:
            if not same(self.in_order(order, rng).written, first.written):
                raise Fault(f"other bits where programs run in {order} order than ascending")
        return first

    def _judge(self, races: Sequence[Race], first: Run, rng: np.random.Generator) -> None:
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
            again = GlobalMemory(self.readable, self.writable, spoiled=spoiled)
            if not same(self.in_order("ascending", rng, again).written, first.written):
                raise Fault(str(races[0]))

    def in_order(
        self,
        order: str,
        rng: np.random.Generator,
        memory: GlobalMemory | None = None,
        watch: Callable[[Access], None] | None = None,
    ) -> Run:
        """Run all programs, and undo what they wrote."""
        memory = memory or GlobalMemory(self.readable, self.writable, watch)
        x, y, z = self.grid
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        if order == "descending":
            indices.reverse()
        elif order != "ascending":
            indices = [indices[i] for i in rng.permutation(len(indices))]
        registers = self._registers(rng)
        programs: list[Program] = []

        def started(index: Grid) -> Iterator[None]:
            shared = SharedMemory(self.shared_bytes, SHARED_START, self.code.grain, rng)
            programs.append(Program(self.code, index, self.grid, registers, memory, shared))
            return programs[-1].run()

        try:
            with np.errstate(all="ignore"):
                _exhaust(map(started, indices), rng, AT_ONCE if order == "interleaved" else 1)
            written = memory.written()
        finally:
            memory.roll_back()
        return Run(memory, programs, written)

    def _registers(self, rng: np.random.Generator) -> dict[str, Array]:
        """What they hold at first, and the parameters."""
        kernel = self.code.kernel
        registers = {**self.code.noise(rng), **self.code.constants}
        for (name, kind), value in zip(kernel.params, self.arguments, strict=True):
            registers[name] = _bits(value, kind, kernel.n_threads)
        return registers


def _exhaust(programs: Iterator[Iterator[None]], rng: np.random.Generator, at_once: int) -> None:
    """Run programs to their end; of `at_once`, a random one runs a block at a time."""
    running = [*islice(programs, at_once)]
    while running:
        i = int(rng.integers(len(running))) if at_once > 1 else 0
        if next(running[i], running) is running:
            running.pop(i)
            running += islice(programs, 1)


def _bits(value: int | float, kind: str, n_threads: int) -> Array:
    """An argument, as every thread's register has it."""
    if kind[0] == "f":
        number: Array = np.full(n_threads, value, FLOATS[kind])
        return number.view(UNSIGNED[bits_of(kind)])
    return np.full(n_threads, int(value) % 2 ** bits_of(kind), UNSIGNED[bits_of(kind)])
