"""What `perf/audit_kernels.py` finds out about a kernel: as a row, as sentences, as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from lab.gpus import GPUS

ALIGNMENT = 16  # bytes: that of a vector
VECTOR_BITS = 128  # 4 elements of float32, 8 of 16 bits
BYTES_OVER_FLOOR = 1.01
LEGEND = """
kernel    rule, flags, dtypes of parameter/gradient/state; * under a GradScaler, and clips and skips
al        bytes of which every address is a multiple
regs      32-bit registers a thread
spill     bytes a thread that did not fit them
shared    bytes of shared memory a program
load      bits of the widest load on the main path, the one of whole blocks; store likewise
instr     machine instructions an element on the main path: what a thread executes from entry to
          end, over the elements that it updates
+slow     the same if every division and root took its detour for zeros, subnormals and infinities
mem       1e9 elements/s that memory allows: bandwidth / floor
issue     1e9 elements/s that instruction issue allows: instructions/s / instr
limit     the smaller of the two
warps     resident warps an SM that registers and shared memory allow, in whole programs
KB        in flight an SM: warps x threads a warp x bytes that a thread waits for at a time
B/param   bytes a parameter that an interpreted step loads and stores, tables included
floor     gradient read once, parameter and state read once and written once
n         update launches a step"""


class Row(NamedTuple):
    """One kernel on one architecture."""

    architecture: str
    kernel: str
    alignment: int  # bytes, of every address
    registers: int  # a thread
    spills: int  # bytes a thread
    shared: int  # bytes a program
    load_bits: int  # the widest load of the main path; 0 where there is no main path
    store_bits: int
    narrowest_bits: int  # of both
    instructions: float  # of the main path, an element
    with_detours: float
    resident_warps: int  # an SM
    in_flight: int  # bytes an SM
    bytes_per_param: float
    floor: int
    launches: int  # a step

    @property
    def memory_rate(self) -> float:
        return GPUS[self.architecture].memory_rate(self.floor)

    @property
    def issue_rate(self) -> float:
        return GPUS[self.architecture].issue_rate(self.instructions)

    @property
    def limit(self) -> str:
        return "memory" if self.memory_rate <= self.issue_rate else "issue"


def findings(row: Row) -> list[str]:
    """What is wrong with a kernel, a sentence each."""
    found = []
    if row.spills:
        found.append(f"spills {row.spills} bytes a thread; 0 are allowed")
    if not row.narrowest_bits:
        found.append("stores no whole block without a mask")
    elif row.alignment == ALIGNMENT and row.narrowest_bits < VECTOR_BITS:
        found.append(
            f"has a load or store of {row.narrowest_bits} bits on its main path; "
            f"{VECTOR_BITS} are asked for"
        )
    if not row.floor <= row.bytes_per_param <= BYTES_OVER_FLOOR * row.floor:
        found.append(
            f"moves {row.bytes_per_param:.3f} bytes a parameter; {row.floor} to "
            f"{BYTES_OVER_FLOOR * row.floor:.3f} are allowed"
        )
    if row.launches != 1:
        found.append(f"takes {row.launches} update launches a step; 1 is allowed")
    if row.architecture == "sm_90" and row.narrowest_bits and row.limit == "issue":
        allowed = GPUS[row.architecture].issue / row.memory_rate
        found.append(
            f"issues {row.instructions:.1f} instructions an element; {allowed:.1f} fit while "
            "memory moves it"
        )
    return [f"{row.architecture} {row.kernel} {sentence}." for sentence in found]


def print_table(rows: Iterable[Row]) -> None:
    """The rows by architecture, and what their columns mean."""
    header = (
        f"{'kernel':<50}{'al':>3}{'regs':>5}{'spill':>6}{'shared':>7}{'load':>5}{'store':>6}"
        f"{'instr':>6}{'+slow':>6}{'mem':>5}{'issue':>6}{'limit':>7}{'warps':>6}{'KB':>4}"
        f"{'B/param':>8}{'floor':>6}{'n':>2}"
    )
    for architecture, group in groupby(rows, key=lambda row: row.architecture):
        print(f"\n{architecture}, {GPUS[architecture].arithmetic()}\n{header}")
        for row in group:
            kernel = row.kernel.removesuffix(" misaligned").replace(" gated", " *")
            print(
                f"{kernel:<50}{row.alignment:>3}{row.registers:>5}{row.spills:>6}"
                f"{row.shared:>7}{row.load_bits:>5}{row.store_bits:>6}{row.instructions:>6.1f}"
                f"{row.with_detours:>6.0f}{row.memory_rate / 1e9:>5.0f}"
                f"{row.issue_rate / 1e9:>6.0f}{row.limit:>7}{row.resident_warps:>6}"
                f"{row.in_flight / 1000:>4.0f}{row.bytes_per_param:>8.3f}{row.floor:>6}"
                f"{row.launches:>2}"
            )
    print(LEGEND)


def as_json(triton_version: str, rows: Iterable[Row]) -> str:
    """The rows, a line each, by architecture and kernel."""
    groups = []
    for architecture, group in groupby(rows, key=lambda row: row.architecture):
        lines = [f'"{row.kernel}": {json.dumps(_measures(row))}' for row in group]
        groups.append(f'"{architecture}": {{\n' + ",\n".join(lines) + "\n}")
    kernels = ",\n".join(groups)
    return f'{{"triton": "{triton_version}", "kernels": {{\n{kernels}\n}}}}\n'


def _measures(row: Row) -> dict[str, float | str]:
    measures = row._asdict() | {"limit": row.limit}
    return {name: measures[name] for name in measures if name not in ("architecture", "kernel")}


def from_json(text: str) -> tuple[str, list[Row]]:
    """Triton's version, and the rows."""
    content = json.loads(text)
    rows = []
    for architecture, kernels in content["kernels"].items():
        for kernel, measures in kernels.items():
            del measures["limit"]
            rows.append(Row(architecture, kernel, **measures))
    return content["triton"], rows
