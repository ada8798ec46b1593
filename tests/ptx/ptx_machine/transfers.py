"""Instructions that move data: between registers and memory, and between lanes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import lanes
from .floats import Array
from .integers import UNSIGNED
from .operands import Operands, Registers, Step, name_of
from .operations import OPERATIONS
from .parser import Instruction, Operand, Symbol, UnknownPTX, Vector, bits_of

if TYPE_CHECKING:
    from .program import Program

MODIFIERS = {
    "weak", "relaxed", "acquire", "release", "gpu", "sys", "cta", "ca", "cg", "cs", "lu", "cv",
    "wb", "wt", "L1::evict_last", "L1::evict_first", "L1::evict_normal", "L1::no_allocate",
}  # fmt: skip
ALL_LANES = 0xFFFFFFFF  # of a warp, a bit each
ATOMICS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "exch": lambda a, b: b, "and": lambda a, b: a & b,
    "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "max": max, "min": min,
}  # fmt: skip


def load_parameter(instruction: Instruction, operands: Operands) -> Step:
    dest, address = instruction.operands
    kind = instruction.op.rsplit(".", 1)[1]
    name = operands.parameter(address, kind)
    return operands.setting(instruction, dest, kind, lambda registers: registers[name])


def join_parts(instruction: Instruction, operands: Operands) -> Step:
    """`mov` from a vector of the parts of a register, the lowest first."""
    dest, source = instruction.operands
    kind = instruction.op.removeprefix("mov.")
    items = _items(source)
    part, wide = bits_of(kind) // len(items), UNSIGNED[bits_of(kind)]
    names = [operands.read(item, f"b{part}") for item in items]

    def joined(registers: Registers) -> Array:
        total: Array = registers[names[0]].astype(wide)
        for i, name in enumerate(names[1:], 1):
            total = total | registers[name].astype(wide) << wide(part * i)
        return total

    return operands.setting(instruction, dest, kind, joined)


def split_parts(instruction: Instruction, operands: Operands) -> Step:
    """`mov` to a vector of the parts of a register, the lowest first."""
    dest, source = instruction.operands
    kind = instruction.op.removeprefix("mov.")
    items = _items(dest)
    part, whole = bits_of(kind) // len(items), operands.read(source, kind)

    def of_part(i: int) -> Callable[[Registers], Array]:
        shift, narrow = UNSIGNED[bits_of(kind)](part * i), UNSIGNED[part]
        return lambda registers: (registers[whole] >> shift).astype(narrow)

    steps = [
        operands.setting(instruction, item, f"b{part}", of_part(i))
        for i, item in enumerate(items)
        if item != Symbol("_")
    ]

    def step(program: Program) -> None:
        for one in steps:
            one(program)

    return step


def load(instruction: Instruction, operands: Operands) -> Step:
    dest, address = instruction.operands
    space, kind = _space_and_type(instruction, dest)
    into = [operands.into(item, kind) for item in _items(dest)]
    place, bits = operands.place(address, space), bits_of(kind)

    def step(program: Program) -> None:
        registers = program.registers
        mask = program.mask(instruction)
        access = program.access(instruction, "load", place(registers), mask, bits * len(into))
        for (name, widen), value in zip(
            into, program.memory[space].load(access, bits), strict=True
        ):
            new = value if widen is None else widen(value)
            if mask is not None:
                merged = registers[name].copy()
                merged[mask] = new
                new = merged
            registers[name] = new

    return step


def store(instruction: Instruction, operands: Operands) -> Step:
    address, source = instruction.operands
    space, kind = _space_and_type(instruction, source)
    names = [operands.read(item, kind) for item in _items(source)]
    place, bits = operands.place(address, space), bits_of(kind)
    narrow = UNSIGNED[bits]

    def step(program: Program) -> None:
        registers = program.registers
        mask = program.mask(instruction)
        access = program.access(instruction, "store", place(registers), mask, bits * len(names))
        values = [registers[name].astype(narrow, copy=False) for name in names]
        if mask is not None:
            values = [value[mask] for value in values]
        program.memory[space].store(access, values)

    return step


def atomic(instruction: Instruction, operands: Operands) -> Step:
    """One that acquires and releases, in a GPU's scope."""
    dest, address, operand = instruction.operands
    found = re.match(r"atom\.global\.gpu\.acq_rel\.(\w+)\.([bu]\d+)$", instruction.op)
    if not found or found[1] not in ATOMICS:
        raise UnknownPTX("an atomic of another kind")
    operation, kind = ATOMICS[found[1]], found[2]
    place, bits = operands.place(address, "global"), bits_of(kind)
    source, (into, _) = operands.read(operand, kind), operands.into(dest, kind)

    def step(program: Program) -> None:
        registers = program.registers
        mask = program.mask(instruction)
        access = program.access(instruction, "atomic", place(registers), mask, bits)
        chosen = slice(None) if mask is None else mask
        values = registers[source][chosen]
        merged = registers[into].copy()
        merged[chosen] = program.memory["global"].atomic(access, values, operation)
        registers[into] = merged

    return step


def shuffle(instruction: Instruction, operands: Operands) -> Step:
    dest, *given = instruction.operands
    names = [name_of(item) for item in _items(dest)]
    values = _of_all_lanes(instruction, given, operands)
    mode = instruction.op.split(".")[2]

    def step(program: Program) -> None:
        results = lanes.shuffle(mode, *values(program.registers))
        program.registers.update(zip(names, results, strict=False))

    return step


def reduce(instruction: Instruction, operands: Operands) -> Step:
    dest, *given = instruction.operands
    values = _of_all_lanes(instruction, given, operands)
    compute = lanes.reduction(*instruction.op.split(".")[2:])
    return operands.setting(instruction, dest, "b32", lambda r: compute(*values(r)))


def compare_pairs(instruction: Instruction, operands: Operands) -> Step:
    """`setp` of the two 16-bit numbers in each register, the low ones first."""
    dest, *given = instruction.operands
    compare = OPERATIONS[instruction.op.removesuffix("x2")].function
    names = [operands.read(operand, "b32") for operand in given]

    def of_half(shift: int) -> Callable[[Registers], Array]:
        def halves(registers: Registers) -> Array:
            return compare(*((registers[n] >> np.uint32(shift)).astype(np.uint16) for n in names))

        return halves

    parts = zip(_items(dest), (0, 16), strict=True)
    steps = [operands.setting(instruction, item, "pred", of_half(shift)) for item, shift in parts]

    def step(program: Program) -> None:
        for half in steps:
            half(program)

    return step


def _of_all_lanes(
    instruction: Instruction, given: list[Operand], operands: Operands
) -> Callable[[Registers], list[Array]]:
    """Reads the operands but for the last, which says which lanes take part."""
    if instruction.predicate:
        raise UnknownPTX("of some lanes")
    *names, members = [operands.read(operand, "b32") for operand in given]

    def values(registers: Registers) -> list[Array]:
        if (registers[members] != ALL_LANES).any():
            raise UnknownPTX(f"of some lanes: {instruction}")
        return [registers[name] for name in names]

    return values


def matrix(instruction: Instruction, operands: Operands) -> Step:
    """`ldmatrix` or `stmatrix`."""
    found = re.match(
        r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.(trans\.)?shared(::cta)?\.b16$",
        instruction.op,
    )
    if not found or instruction.predicate:
        raise UnknownPTX("matrices of another kind")
    loads, count, transposed = found[1] == "ld", int(found[2]), bool(found[3])
    vector, address = instruction.operands if loads else instruction.operands[::-1]
    place = operands.place(address, "shared")
    names = [operands.read(item, "b32") for item in _items(vector)]
    if len(names) != count:
        raise UnknownPTX("another number of matrices")

    def step(program: Program) -> None:
        registers, shared = program.registers, program.memory["shared"]
        mask = lanes.row_threads(program.n_threads, count)
        kind = "load" if loads else "store"
        access = program.access(instruction, kind, place(registers), mask, 128)
        if loads:
            rows = shared.load(access, 16)
            registers.update(zip(names, lanes.fragments(rows, count, transposed), strict=True))
        else:
            shared.store(access, lanes.rows_of([registers[name] for name in names], transposed))

    return step


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _space_and_type(instruction: Instruction, vector: Operand) -> tuple[str, str]:
    _, space, *modifiers, kind = instruction.op.split(".")
    lengths = [int(m[1]) for m in modifiers if re.match(r"v\d$", m)]
    unknown = {m for m in modifiers if not re.match(r"v\d$", m)} - MODIFIERS
    if unknown or (lengths or [1]) != [len(_items(vector))]:
        raise UnknownPTX(f"an access with {sorted(unknown) or 'other operands'}")
    return space.partition("::")[0], kind
