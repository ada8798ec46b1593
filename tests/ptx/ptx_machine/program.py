"""One program of a launch while it runs: a CTA, whose threads run abreast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .access import Access, Fault
from .floats import Array
from .global_memory import GlobalMemory
from .integers import UNSIGNED
from .parser import Instruction, UnknownPTX, bits_of, parse
from .shared_memory import SharedMemory
from .translator import translate

MAX_BLOCKS = 5_000  # that a program runs; one that runs more is taken to hang


class Code:
    """A kernel, translated.

    Raises:
        UnknownPTX: the text has something that the machine was not taught.
    """

    def __init__(self, text: str) -> None:
        kernel = parse(text)
        self.text, self.kernel = text, kernel
        self.blocks, constants = translate(kernel)
        threads = np.arange(kernel.n_threads, dtype=np.uint32)
        zeros = np.zeros_like(threads)
        self.threads = threads
        self.grain = min(map(_shared_bytes, kernel.instructions), default=8)
        self.constants = {
            **constants,
            **{f"tid.{axis}": zeros for axis in "yz"},
            **{f"ntid.{axis}": zeros + 1 for axis in "yz"},
            "tid.x": threads,
            "ntid.x": zeros + np.uint32(kernel.n_threads),
            "laneid": threads % 32,
            "warpid": threads // 32,
        }

    def noise(self, rng: np.random.Generator) -> dict[str, Array]:
        """What registers hold before they are set."""
        n = self.kernel.n_threads
        drawn: dict[int, Array] = {1: rng.integers(0, 2, n).astype(bool)}
        for bits in (16, 32, 64):
            drawn[bits] = rng.integers(0, 2**bits, n, dtype=UNSIGNED[bits])
        return {name: drawn[bits] for name, bits in self.kernel.registers.items()}


def _shared_bytes(instruction: Instruction) -> int:
    """Of the smallest part of shared memory that an instruction looks at: 8 if it is none."""
    if ".shared" not in instruction.op:
        return 8
    return min(bits_of(instruction.op.rsplit(".", 1)[1]) // 8, 8)


class Program:
    """
    Args:
        index: (x, y, z) in the grid.
        registers: what they hold at first.
    """

    def __init__(
        self,
        code: Code,
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        registers: Mapping[str, Array],
        globals: GlobalMemory,
        shared: SharedMemory,
    ) -> None:
        self.code, self.shared = code, shared
        self.memory: dict[str, GlobalMemory | SharedMemory] = {"global": globals, "shared": shared}
        self.n_threads = code.kernel.n_threads
        self.number = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        self.phase = 0
        self.counts = [0] * len(code.blocks)
        self.registers = dict(registers)
        for axis, mine, size in zip("xyz", index, grid, strict=True):
            self.registers[f"ctaid.{axis}"] = np.full(self.n_threads, mine, np.uint32)
            self.registers[f"nctaid.{axis}"] = np.full(self.n_threads, size, np.uint32)

    @property
    def n_instructions(self) -> int:
        """That each thread has run."""
        return sum(n * block.size for n, block in zip(self.counts, self.code.blocks, strict=True))

    def run(self) -> Iterator[None]:
        """Pauses after every block, where other programs may go on."""
        at = 0
        for _ in range(MAX_BLOCKS):
            if at == len(self.code.blocks):
                raise Fault(f"program {self.number} runs past the end of its code")
            self.counts[at] += 1
            block = self.code.blocks[at]
            for step in block.steps:
                step(self)
            at += 1
            if block.end is not None:
                if block.end.op == "bar.sync":
                    self.phase += 1
                elif self._all_take(block.end):
                    if block.target is None:
                        self.registers.clear()
                        return
                    at = block.target
            yield
        raise Fault(f"program {self.number} does not end")

    def _all_take(self, branch: Instruction) -> bool:
        mask = self.mask(branch)
        if mask is None:
            return True
        if mask.any():
            raise UnknownPTX(f"a branch that some threads of a program take: {branch}")
        return False

    def mask(self, instruction: Instruction) -> Array | None:
        """The threads that run an instruction, if not all do."""
        if instruction.predicate is None:
            return None
        mask = self.registers[instruction.predicate]
        if instruction.negated:
            mask = ~mask
        return None if mask.all() else mask

    def access(
        self, instruction: Instruction, kind: str, addresses: Array, mask: Array | None, bits: int
    ) -> Access:
        threads = self.code.threads
        if mask is not None:
            addresses, threads = addresses[mask], threads[mask]
        return Access(instruction, kind, self.number, self.phase, addresses, threads, bits // 8)
