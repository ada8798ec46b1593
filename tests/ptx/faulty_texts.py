"""PTX texts with one fault each, and what the machine says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ptx_machine.access import Fault
from ptx_machine.global_memory import same
from ptx_machine.grid import Launch
from ptx_machine.parser import Instruction, UnknownPTX
from ptx_machine.program import Code

KERNELS = Path(__file__).parents[2] / "kernels"
OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


class Mutant(NamedTuple):
    """One instruction of a text replaced.

    Attributes:
        fault: what is wrong with it.
        statement: of the kernel's source, for which the instruction was compiled.
        changed: the instruction, which is left out where this is empty.
    """

    fault: str
    statement: str
    instruction: Instruction
    changed: str

    def of(self, text: str) -> str:
        lines = text.splitlines()
        lines[self.instruction.line - 1] = f"{self.changed};" if self.changed else ""
        return "\n".join(lines)


def mutants(code: Code) -> Iterator[Mutant]:
    """Every fault of every statement, in the first of its instructions that can have it."""
    seen = set()
    for instruction in code.kernel.instructions:
        for fault, changed in _changes(instruction):
            key = (fault, instruction.op, instruction.source)
            if key not in seen:
                seen.add(key)
                yield Mutant(fault, _statement(instruction), instruction, changed)


def _changes(instruction: Instruction) -> Iterator[tuple[str, str]]:
    text, op = instruction.text, instruction.op
    if op == "bar.sync":
        yield "barrier dropped", ""
    if op.startswith("atom."):
        yield "atomic relaxed", text.replace("acq_rel", "relaxed")
    if found := re.match(r"setp\.(lt|le|gt|ge)\.[su]", op):
        changed = op.replace(found[1], OFF_BY_ONE[found[1]])
        yield "bound off by one", text.replace(op, changed)
    if re.match(r"(ld|st)\.(global|shared)", op):
        size = int(re.findall(r"\d+", op)[-1]) // 8
        if found := re.search(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", text):
            moved = f"[{found[1]}+{int(found[2] or 0) + size}]"
            yield "offset of one more", text.replace(found[0], moved)
        if found := re.search(r"\{\s*(%\w+),\s*(%\w+)", text):
            swapped = found[0].replace(found[1], "%first").replace(found[2], found[1])
            yield "halves swapped", text.replace(found[0], swapped.replace("%first", found[2]))
        if op.startswith("st.") and instruction.predicate:
            yield "mask of a store dropped", re.sub(r"^@\S+\s+", "", text)


def _statement(instruction: Instruction) -> str:
    name, line = instruction.source.split(":")
    source = KERNELS / name
    return source.read_text().splitlines()[int(line) - 1].strip() if source.exists() else name


def survivors(launch: Launch) -> tuple[int, list[Mutant]]:
    """How many mutants of a launch's text there are, and those that nothing notices.

    Which is to raise nothing, and to write the same bits.
    """
    right = launch.attempt().written
    tried = [*mutants(launch.code)]

    def survives(mutant: Mutant) -> bool:
        try:
            faulty = replace(launch, code=Code(mutant.of(launch.code.text)))
            alone = faulty.in_order("ascending", np.random.default_rng(0)).written
            return same(right, alone) and same(right, faulty.attempt().written)
        except (Fault, UnknownPTX):
            return False

    return len(tried), [mutant for mutant in tried if survives(mutant)]
