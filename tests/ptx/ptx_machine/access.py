"""What an instruction does to memory, and what must not happen there."""

from __future__ import annotations

from typing import NamedTuple

from .floats import Array
from .parser import Instruction

MAX_THREADS = 1024  # of a program


class Fault(Exception):
    """What a GPU would trap, or what no kernel should do."""


class Access(NamedTuple):
    """One instruction of one program, without the threads that it leaves out."""

    instruction: Instruction
    kind: str  # "load", "store" or "atomic"
    program: int
    phase: int  # barriers that the program has passed
    addresses: Array
    threads: Array
    size: int  # bytes a thread

    def __str__(self) -> str:
        return f"program {self.program}: {self.instruction}"

    def check_alignment(self) -> None:
        """
        Raises:
            Fault: an address is no multiple of what a thread accesses there.
        """
        off = self.addresses % self.addresses.dtype.type(self.size) != 0
        if off.any():
            where = int(self.addresses[off][0])
            raise Fault(f"misaligned {self.kind} of {self.size} bytes at {where:#x}, {self}")
