"""PTX text as basic blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class UnknownPTX(NotImplementedError):
    """PTX that this machine does not know, and so does not run."""


class Register(NamedTuple):
    name: str  # without the %; special ones are "tid.x" and the like


class Immediate(NamedTuple):
    text: str


class Symbol(NamedTuple):
    """A parameter, an array in shared memory, or a label."""

    name: str


class Address(NamedTuple):
    base: Register | Immediate | Symbol
    offset: int


class Vector(NamedTuple):
    items: tuple[Operand, ...]


Operand = Register | Immediate | Symbol | Address | Vector


class Instruction(NamedTuple):
    line: int  # of the PTX text
    text: str
    predicate: str | None  # register
    negated: bool
    op: str
    operands: tuple[Operand, ...]
    source: str  # file and line of the Triton source

    def __str__(self) -> str:
        return f"{self.text} (PTX line {self.line}, {self.source})"


@dataclass
class Kernel:
    """What one PTX text holds.

    Attributes:
        params: name and type of each.
        registers: bits by name; 1 of a predicate.
        shared: names of arrays in shared memory, which start at the same address.
        blocks: run from first to last; an instruction that branches, ends, or waits for others is
            the last of its block, and an atomic stands alone.
        labels: the index of the block that each stands before.
    """

    name: str = ""
    n_threads: int = 0
    params: list[tuple[str, str]] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]


INSTRUCTION = re.compile(r"(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)\s*(.*)$")
ADDRESS = re.compile(r"\[\s*(%?[A-Za-z_$][\w$]*)\s*(?:\+\s*(-?\w+))?\s*\]$")
# The last is a string that no instruction reads, of Triton 3.3.
IGNORED = re.compile(
    r"\)|\.(version|target|address_size|maxnreg|minnctapersm|maxntid|file)\b"
    r"|\.global \.align 1 \.b8 _\$_str"
)
# Half of a register, as Triton 3.3 takes it: the other goes to a register of its own.
HALF = re.compile(
    r"\{(\s*)\.reg \.b(?:16|32) (%temp|tmp);(\s*)(mov\.b\d+\s+\{[^}]*\}, %\w+;)(\s*)\}"
)
ENDS = ("bra", "bra.uni", "ret", "bar.sync")


def bits_of(kind: str) -> int:
    """How many a PTX type has: 32 of "s32", 64 of "f32x2"."""
    if kind == "pred":
        return 1
    bits = int(re.findall(r"\d+", kind)[0])
    return 2 * bits if kind.endswith("x2") else bits


def parse(text: str) -> Kernel:
    """The one kernel of a PTX text.

    Raises:
        UnknownPTX: a line that is none of those that Triton writes.
    """
    kernel = Kernel()
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text, re.MULTILINE))
    read, source = _head, ""
    text = HALF.sub(lambda found: "".join(found.group(1, 3, 4, 5)).replace(found[2], "_"), text)
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if line == "{" and read is _head and kernel.name:
            read = _declaration
        elif line == "}":
            break
        elif found := re.match(r"\.loc\s+(\d+) (\d+)", line):
            source = f"{files.get(found[1], found[1])}:{found[2]}"
        elif line.startswith((".", ")")) or (line and read is _head):
            if not read(kernel, line):
                raise UnknownPTX(f"PTX line {number}: {line}")
        elif found := re.match(r"(\$\w+):$", line):
            _label(kernel, found[1])
        else:
            for statement in filter(None, (part.strip() for part in line.split(";"))):
                _append(kernel, _instruction(number, statement, source))
    return kernel


def _head(kernel: Kernel, line: str) -> bool:
    """What stands before the body."""
    if found := re.match(r"(?:\.extern )?\.shared \.align \d+ \.b8 (\w+)\[\d*\]", line):
        kernel.shared.append(found[1])
    elif found := re.match(r"\.visible \.entry (\w+)\(", line):
        kernel.name = found[1]
    elif found := re.match(r"\.param \.(\w+)\s.*?(\w+),?$", line):
        kernel.params.append((found[2], found[1]))
    elif found := re.match(r"\.reqntid (\d+)(?:, 1, 1)?$", line):
        kernel.n_threads = int(found[1])
    else:
        return bool(IGNORED.match(line))
    return True


def _declaration(kernel: Kernel, line: str) -> bool:
    if found := re.match(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", line):
        names = (f"{found[2]}{i}" for i in range(int(found[3])))
        kernel.registers |= dict.fromkeys(names, bits_of(found[1]))
        return True
    return line == '.pragma "nounroll";'


def _label(kernel: Kernel, name: str) -> None:
    if not name.startswith("$L__BB"):
        return  # the debugger's; an instruction that names one will not find it
    if kernel.blocks[-1]:
        kernel.blocks.append([])
    kernel.labels[name] = len(kernel.blocks) - 1


def _append(kernel: Kernel, instruction: Instruction) -> None:
    atomic = instruction.op.startswith("atom")
    if atomic and kernel.blocks[-1]:
        kernel.blocks.append([])
    kernel.blocks[-1].append(instruction)
    if atomic or instruction.op in ENDS:
        kernel.blocks.append([])


def _instruction(line: int, text: str, source: str) -> Instruction:
    found = INSTRUCTION.match(text)
    if not found:
        raise UnknownPTX(f"{text} (PTX line {line}, {source})")
    negated, predicate, op, rest = found.groups()
    try:
        operands = tuple(_operand(part.strip()) for part in _split(rest))
    except UnknownPTX as error:
        raise UnknownPTX(f"{error} of {text} (PTX line {line}, {source})") from None
    return Instruction(line, text, predicate, negated == "!", op, operands, source)


def _split(text: str) -> list[str]:
    """The parts between commas, but for commas inside of brackets."""
    return re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part.strip()) for part in text[1:-1].split(",")))
    if "|" in text:
        return Vector(tuple(_operand(part) for part in text.split("|")))
    if found := ADDRESS.match(text):
        base = _operand(found[1])
        assert isinstance(base, Register | Symbol)
        return Address(base, int(found[2] or "0", 0))
    if re.match(r"%[A-Za-z_]\w*(\.[xyz])?$", text):
        return Register(text[1:])
    if re.match(r"-?\d+U?$|0[fFdD][0-9A-Fa-f]+$|0[xX][0-9A-Fa-f]+U?$", text):
        return Immediate(text.removesuffix("U"))
    if re.match(r"[A-Za-z_$][\w$]*$", text):
        return Symbol(text)
    raise UnknownPTX(f"the operand {text}")
