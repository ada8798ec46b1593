"""Instructions as Python functions of the program that runs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from . import transfers
from .floats import Array
from .integers import UNSIGNED
from .operands import Operands, Registers, Step, name_of
from .operations import OPERATIONS
from .parser import Immediate, Instruction, Kernel, UnknownPTX, Vector, bits_of

TRANSFERS: tuple[tuple[str, Callable[[Instruction, Operands], Step]], ...] = (
    (r"ld\.param\.", transfers.load_parameter),
    (r"ld\.(global|shared|shared::cta)\.", transfers.load),
    (r"st\.(global|shared|shared::cta)\.", transfers.store),
    (r"atom\.", transfers.atomic),
    (r"shfl\.sync\.(idx|up|down|bfly)\.b32$", transfers.shuffle),
    (r"redux\.sync\.\w+\.(b32|s32|u32)$", transfers.reduce),
    (r"(ld|st)matrix\.", transfers.matrix),
    (r"setp\.\w+\.b?f16x2$", transfers.compare_pairs),
    (r"bar\.warp\.sync$", lambda *_: lambda _: None),  # lanes run abreast
)


@dataclass
class Block:
    """What is run without a branch.

    Attributes:
        steps: one an instruction, but for the end.
        end: the last instruction, if it branches, ends the program or waits for its threads.
        target: the block to which it branches.
        size: number of instructions.
    """

    steps: list[Step]
    end: Instruction | None
    target: int | None
    size: int


def translate(kernel: Kernel) -> tuple[list[Block], dict[str, Array]]:
    """The kernel's blocks, and what registers hold that none of them sets.

    Raises:
        UnknownPTX: an instruction that the machine was not taught.
    """
    operands = Operands(kernel)
    return [_block(block, kernel, operands) for block in kernel.blocks], operands.constants


def _block(instructions: list[Instruction], kernel: Kernel, operands: Operands) -> Block:
    block = Block([], None, None, len(instructions))
    for instruction in instructions:
        try:
            if instruction.op in ("bra", "bra.uni"):
                (label,) = instruction.operands
                block.end, block.target = instruction, kernel.labels[name_of(label)]
            elif instruction.op == "ret":
                block.end = instruction
            elif instruction.op == "bar.sync":
                if instruction.predicate or instruction.operands != (Immediate("0"),):
                    raise UnknownPTX("a barrier of some threads")
                block.end = instruction
            else:
                block.steps.append(_step(instruction, operands))
        except (UnknownPTX, KeyError, ValueError) as error:
            raise UnknownPTX(f"{error}: {instruction}") from error
    return block


def _step(instruction: Instruction, operands: Operands) -> Step:
    if instruction.op.startswith("mov."):
        dest, source = instruction.operands
        if isinstance(source, Vector):
            return transfers.join_parts(instruction, operands)
        if isinstance(dest, Vector):
            return transfers.split_parts(instruction, operands)
    if instruction.op in OPERATIONS:
        return _compute(instruction, operands)
    for pattern, transfer in TRANSFERS:
        if re.match(pattern, instruction.op):
            return transfer(instruction, operands)
    raise UnknownPTX("an instruction that the machine was not taught")


def _compute(instruction: Instruction, operands: Operands) -> Step:
    function, kinds, result = OPERATIONS[instruction.op]
    dest, *given = instruction.operands
    converts = instruction.op.startswith("cvt.")
    sources = [
        operands.read(operand, kind, wider=converts)
        for operand, kind in zip(given, kinds, strict=True)
    ]

    def value(registers: Registers) -> Array:
        return function(*[registers[source] for source in sources])

    narrow = UNSIGNED[bits_of(kinds[0])] if converts or bits_of(kinds[0]) == 8 else None

    def narrowed(registers: Registers) -> Array:
        return function(*[registers[source].astype(narrow, copy=False) for source in sources])

    return operands.setting(instruction, dest, result, value if narrow is None else narrowed)
