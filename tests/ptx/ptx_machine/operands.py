"""Where a program finds the operands of its instructions: in named registers, all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from .floats import Array
from .integers import SIGNED, UNSIGNED
from .parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Symbol,
    UnknownPTX,
    bits_of,
)

if TYPE_CHECKING:
    from .program import Program

Step = Callable[["Program"], None]  # runs an instruction
Registers = Mapping[str, Array]

SPECIAL = re.compile(r"(tid|ntid|ctaid|nctaid)\.[xyz]$|laneid$|warpid$")
SHARED_START = 1024  # of a program's shared memory; on sm_90 the driver has what is before


class Operands:
    """
    Args:
        kernel: whose registers, parameters and shared memory are meant.

    Attributes:
        constants: what registers hold that no instruction sets, by name.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.constants: dict[str, Array] = {}

    def read(self, operand: Operand, kind: str, *, wider: bool = False) -> str:
        """The register that holds an operand of this type.

        Args:
            wider: whether it may be the lowest bits of a register, as those of 8 bits always are.

        Raises:
            UnknownPTX: it is of another width, or none that is known.
        """
        bits = bits_of(kind)
        if isinstance(operand, Register):
            if not SPECIAL.match(operand.name):
                held = self._kernel.registers[operand.name]
                if held != bits and not ((wider or bits == 8) and held > bits):
                    raise UnknownPTX(f"%{operand.name} of {held} bits as {kind}")
            return operand.name
        if isinstance(operand, Immediate):
            return self._constant(operand.text, kind)
        if isinstance(operand, Symbol) and operand.name in self._kernel.shared:
            return self._constant(str(SHARED_START), kind)
        raise UnknownPTX(f"{operand} as {kind}")

    def _constant(self, text: str, kind: str) -> str:
        bits = bits_of(kind)
        if floating := re.match(r"0([fFdD])([0-9A-Fa-f]+)$", text):
            if (bits == 64) != (floating[1] in "dD"):
                raise UnknownPTX(f"{text} as {kind}")
            pattern = int(floating[2], 16)
        elif kind[0] == "f":
            raise UnknownPTX(f"the float {text}")
        else:
            pattern = int(text, 0) % 2**bits
        name = f"{text}:{bits}"
        dtype = UNSIGNED.get(bits, bool)
        self.constants[name] = np.full(self._kernel.n_threads, pattern, dtype)
        return name

    def parameter(self, address: Operand, kind: str) -> str:
        if not isinstance(address, Address):
            raise UnknownPTX(f"{address} as a parameter")
        name = name_of(address.base)
        if address.offset or bits_of(dict(self._kernel.params)[name]) != bits_of(kind):
            raise UnknownPTX("a part of a parameter")
        return name

    def place(self, address: Operand, space: str) -> Callable[[Registers], Array]:
        """Reads an address in "global" or "shared" memory."""
        if not isinstance(address, Address):
            raise UnknownPTX(f"{address} as an address")
        bits = 64 if space == "global" else 32
        base = self.read(address.base, f"u{bits}")
        offset = UNSIGNED[bits](address.offset % 2**bits)
        return lambda registers: registers[base] + offset

    def into(self, dest: Operand, kind: str) -> tuple[str, Callable[[Array], Array] | None]:
        """The register for a result, and what makes the result as wide."""
        name = name_of(dest)
        held, bits = self._kernel.registers[name], bits_of(kind)
        if held == bits:
            return name, None
        if held < bits:
            raise UnknownPTX(f"%{name} of {held} bits for {kind}")
        table = SIGNED if kind[0] == "s" else UNSIGNED
        narrow, wide, unsigned = table[bits], table[held], UNSIGNED[held]
        return name, lambda value: value.view(narrow).astype(wide).view(unsigned)

    def setting(
        self, instruction: Instruction, dest: Operand, kind: str, value: Callable[..., Array]
    ) -> Step:
        """Sets a register to a value of this type, in the threads that the predicate has.

        Args:
            value: of the registers.
        """
        name, widen = self.into(dest, kind)

        def step(program: Program) -> None:
            registers = program.registers
            new = value(registers)
            if widen is not None:
                new = widen(new)
            mask = program.mask(instruction)
            registers[name] = new if mask is None else np.where(mask, new, registers[name])

        return step


def name_of(operand: Operand) -> str:
    if not isinstance(operand, Register | Symbol):
        raise UnknownPTX(f"{operand} where a name should be")
    return operand.name
