"""Compiled kernels as instructions: NVIDIA's, by the disassembler that Triton brings, and AMD's."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.control_flow import Instruction
from triton_optim.testing.compiled import BINARIES, Usage, usage

SASS_INSTRUCTION_BYTES = 16
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*) *([^;]*?) *;")
_SASS_REGISTER = re.compile(r"\b(U?R)(\d+)\b|\b(SR_TID\.X)")
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SASS_ACCESSES = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
_SASS_STORES = {"STG", "STS", "STL"}
_SASS_OTHER_JUMPS = {"BRX", "BRXU", "JMP", "JMX", "JMXU"}

_AMDGCN = re.compile(r"^\t([a-z]\w+)(?:[ \t]+([^;\n]*?))?[ \t]*(?:;.*)?$|^(\.?\w+):", re.MULTILINE)
_AMDGCN_REGISTER = re.compile(r"\b([asv])(?:(\d+)|\[(\d+):(\d+)\])")
_AMDGCN_ACCESS = re.compile(r"(?:buffer|flat|global)_(load|store)_(\w+?)(?:_d16(?:_hi)?)?")
_AMDGCN_BYTES = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
_AMDGCN_OTHER_JUMPS = {"s_setpc_b64", "s_swappc_b64", "s_call_b64"}


def disassembled(
    architecture: str, kernels: Sequence[Any]
) -> list[tuple[list[Instruction], Usage]]:
    """The instructions of compiled kernels, and what each takes for itself."""
    if architecture.startswith("gfx"):
        code = [amdgcn(kernel.asm["amdgcn"]) for kernel in kernels]
    else:
        code = sass([kernel.asm["cubin"] for kernel in kernels], architecture)
    return [(c, usage(architecture, kernel)) for c, kernel in zip(code, kernels, strict=True)]


def sass(cubins: Sequence[bytes], architecture: str) -> list[list[Instruction]]:
    """The instructions of cubins for one architecture, such as "sm_90".

    One call of nvdisasm takes them all, end to end: it takes 0.3 s to start.
    """
    texts = [_text_section(cubin) for cubin in cubins]
    number = int(architecture.removeprefix("sm_"))
    name = f"SM{number}a" if number >= 90 else f"SM{number}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        Path(file.name).write_bytes(b"".join(texts))
        printed = _run("nvdisasm", "--binary", name, file.name)
    lines = [line for line in printed.splitlines() if _SASS.search(line)]
    kernels, start = [], 0
    for text in texts:
        stop = start + len(text) // SASS_INSTRUCTION_BYTES
        kernels.append(parse_sass("\n".join(lines[start:stop])))
        start = stop
    assert start == len(lines), "a line that is not understood"
    return kernels


def parse_sass(listing: str) -> list[Instruction]:
    """The instructions of one kernel, from lines such as `/*0480*/ @!P0 BRA 0x4d0 ;`."""
    lines = [*_SASS.finditer(listing)]
    places = {int(line[1], 16): i for i, line in enumerate(lines)}
    return [_sass_instruction(line, places) for line in lines]


def _sass_instruction(line: re.Match[str], places: dict[int, int]) -> Instruction:
    predicate, opcode, operands = line[2], line[3], line[4]
    name, *modifiers = opcode.split(".")
    if name in _SASS_OTHER_JUMPS:
        raise ValueError(f"a jump that is not followed: {line[0]}")
    n_bytes = next((_SASS_BYTES[m] for m in modifiers if m in _SASS_BYTES), 4)
    # The result comes first; of several registers, the lowest is named.
    result, _, others = operands.partition(",")
    if not re.match(r"U?R\d", result) or name in _SASS_STORES:
        result, others = "", operands
    wide = name != "F2I" and modifiers[:1] in (
        ["WIDE"],
        ["F64"],
    )  # F2I's operand is, not its result
    pair = name[0] == "D" or name == "CS2R" or wide
    width = n_bytes // 4 if name.startswith(("LD", "ULD")) else 2 if pair else 1
    jumps = name in ("BRA", "CALL")
    target = places[int(operands.split()[-1], 16)] if jumps else None
    conditional = predicate is not None or (name == "BRA" and len(operands.split()) > 1)
    return Instruction(
        reads=_sass_registers(others),
        writes=_sass_registers(result, max(width, 1)),
        predicated=predicate is not None,
        jumps_to=target if name == "BRA" else None,
        calls=target if name == "CALL" else None,
        ends=name in ("EXIT", "RET"),
        falls_through=conditional or name not in ("BRA", "EXIT", "RET"),
        access=_SASS_ACCESSES.get(name, ""),
        n_bytes=n_bytes,
        waits=name == "DEPBAR",
    )


def _sass_registers(text: str, width: int = 1) -> frozenset[str]:
    return frozenset(
        special or f"{kind}{int(number) + i}"
        for kind, number, special in _SASS_REGISTER.findall(text)
        for i in range(width)
    )


def _text_section(cubin: bytes) -> bytes:
    """The machine code in an ELF file of one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    (n_sections,) = struct.unpack_from("<H", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(n_sections)]
    executable = [
        cubin[start : start + size] for _, _, flags, _, start, size in headers if flags & 4
    ]
    if len(executable) != 1:
        raise ValueError(f"{len(executable)} kernels in a cubin")
    return executable[0]


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of an assembly of one kernel."""
    body = text[: text.index(".amdhsa_kernel")]
    places: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for found in _AMDGCN.finditer(body):
        if found[3]:
            places[found[3]] = len(lines)
        else:
            lines.append((found[1], found[2] or ""))
    return [_amdgcn_instruction(*line, places) for line in lines]


def _amdgcn_instruction(opcode: str, operands: str, places: dict[str, int]) -> Instruction:
    if opcode in _AMDGCN_OTHER_JUMPS:
        raise ValueError(f"a jump that is not followed: {opcode} {operands}")
    access = _AMDGCN_ACCESS.fullmatch(opcode)
    result, _, others = operands.partition(",")
    if "store" in opcode or opcode.startswith("ds_write"):
        result, others = "", operands
    return Instruction(
        reads=_amdgcn_registers(others),
        writes=_amdgcn_registers(result),
        jumps_to=places[operands] if "branch" in opcode else None,
        ends=opcode == "s_endpgm",
        falls_through=opcode not in ("s_branch", "s_endpgm"),
        access=access[1] if access else "",
        n_bytes=_AMDGCN_BYTES[access[2]] if access else 0,
    )


def _amdgcn_registers(text: str) -> frozenset[str]:
    found: set[str] = set()
    for kind, number, first, last in _AMDGCN_REGISTER.findall(text):
        numbers = [number] if number else range(int(first), int(last) + 1)
        found |= {f"{kind}{n}" for n in numbers}
    return frozenset(found)


def _run(tool: str, *args: str) -> str:
    command = [str(BINARIES / tool), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
