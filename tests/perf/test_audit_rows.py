"""perf/audit_rows.py: what kernels over rows are held to, and that a fault would be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from lab.disassembly import amdgcn, parse_sass
from lab.row_code import Loop, RowAccess, main_loop, row_accesses
from lab.row_report import Row, findings, step_findings
from lab.row_traffic import Step, measure

ROOT = Path(__file__).parents[2]


def _compiling() -> dict[str, str]:
    """The environment of a process in which Triton does not interpret."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


GOOD = Row(
    "sm_90", "adagrad - sparse f32 64/4", 16, 4, 4, 128, 0, 4096, 128, 128, 20, 0, 4, 1512, 742, 4,
    34816,
)  # fmt: skip
ALONE = GOOD._replace(kernel="adagrad - sparse f32 64/1", multiple=1, adjacent=1)
STEP = Step("adagrad - f32 64 hot", 512, 326, 64, 32, 464896, 464896, 0, 11468, 4096, 34816, 3725)


@pytest.mark.parametrize(
    ("row", "fault", "finding"),
    [
        (GOOD, {"spills": 8}, "spills 8 bytes a thread; 0 are allowed."),
        (ALONE, {"spills": 8}, None),
        (
            GOOD,
            {"split": 8},
            "has 8 of 20 loads and stores of rows that are narrower than 4 elements or 128 bits.",
        ),
        (ALONE, {"adjacent": 4}, "has 4 elements next to each other a thread, loaded by 1."),
        (STEP, {"moved": 464640}, "moves 464640 bytes of values and rows, 0 elements not exactly "
         "once; 464896 are the floor."),
        (STEP, {"astray": 64}, "moves 464896 bytes of values and rows, 64 elements not exactly "
         "once; 464896 are the floor."),
        (STEP, {"keys": 18000}, "moves 25821 bytes of ids, keys, order and tables; 23552 are "
         "allowed."),
        (STEP, {"partials": 32769}, "moves 32769 bytes of partial sums; 32768 are allowed."),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_fault_is_a_finding(row: Row | Step, fault: dict[str, int], finding: str | None) -> None:
    judge = findings if isinstance(row, Row) else step_findings
    row = row._replace(**{"partials": 0} if isinstance(row, Step) else {})  # type: ignore[arg-type]
    assert judge(row) == []  # type: ignore[arg-type]
    found = judge(row._replace(**fault))  # type: ignore[arg-type]
    name = f"{row.architecture} {row.kernel}" if isinstance(row, Row) else row.name
    assert found == ([] if finding is None else [f"{name} {finding}"])


EXAMINE = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from audit_rows import examine
from lab.row_kernels import kernel_of
from lab.row_report import findings
kernels = [kernel_of("Adagrad", {}, (torch.float32,) * 3, width) for width in (64, 63)]
for row in examine("sm_90", kernels):
    print(*findings(row))
"""
MEASURE = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from lab.row_report import step_findings
from lab.row_traffic import measure
print(*step_findings(measure("sm_90", "Adagrad", {}, torch.float32, 64, "hot")))
"""


@pytest.mark.parametrize(
    ("script", "file", "old", "new", "finding"),
    [
        (EXAMINE, "kernels/chunks.py", "if ALIGNED:", "if False:", "narrower than 4 elements"),
        (
            EXAMINE,
            "kernels/rows.py",
            "width = tl.multiple_of(tl.load(tensor_ptr + WIDTH), MULTIPLE)",
            "width = tl.load(tensor_ptr + WIDTH)",
            "narrower than 4 elements",
        ),
        (
            EXAMINE,
            "kernels/rows.py",
            "slot.to(tl.int64)[:, None] * width + column",
            "slot.to(tl.int64)[:, None] * COLUMNS + column",
            "next to each other",
        ),
        (
            EXAMINE,
            "triton_optim/launch/row_launcher.py",
            "FOUR_PROGRAMS_REGISTERS = 128",
            "FOUR_PROGRAMS_REGISTERS = 64",
            "spills",
        ),
        (
            MEASURE,
            "kernels/rows.py",
            "updated = complete[:, None] & within",
            "updated = ends[:, None] & within",
            "not exactly once",
        ),
        (
            MEASURE,
            "kernels/rows.py",
            "partial[:, None] & within",
            "inside[:, None] & within",
            "bytes of partial sums",
        ),
    ],
    ids=[
        "no alignment",
        "any width",
        "aligned sums",
        "few registers",
        "rows twice",
        "all sums stored",
    ],
)
def test_a_changed_kernel_is_found(
    script: str, file: str, old: str, new: str, finding: str, tmp_path: Path
) -> None:
    """From source to finding, for Adagrad in float32."""
    for name in ("kernels", "perf", "triton_optim"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    source = (tmp_path / file).read_text()
    assert source.count(old) >= 1
    (tmp_path / file).write_text(source.replace(old, new, 1))
    environment = _compiling()
    if script is MEASURE:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "perf")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert finding in done.stdout


LAUNCHED = """
import re, sys, tempfile
sys.path[:0] = sys.argv[1:]
import torch
from torch.nn import Parameter
import triton_optim
from lab.disassembly import _run
from lab.dry_gpu import dry_gpu
from lab.row_code import instructions
from lab.row_kernels import Kernel, compiled, kernel_of
from triton_optim.kernels.keys import keys_kernel
from triton_optim.kernels.rows import rows_kernel

param = Parameter(torch.zeros(100, 64))
ids, values = torch.arange(9)[None], torch.ones(9, 64)
param.grad = torch.sparse_coo_tensor(ids, values, param.shape, check_invariants=True)
with dry_gpu("sm_90"):
    triton_optim.Adagrad([param]).step()
    kernel = kernel_of("Adagrad", {}, (torch.float32,) * 3, 64)
    for function, audited in ((rows_kernel, kernel), (keys_kernel, Kernel("keys"))):
        (launched,) = (k for c in function.device_caches.values() for k in c[0].values())
        assert launched.asm["cubin"] == compiled("sm_90", audited).asm["cubin"]
    binary = compiled("sm_90", kernel)

with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(binary.asm["cubin"])
    file.flush()
    listing = _run("nvdisasm", "-g", "-c", file.name)
machine, place = set(), ("", 0)
for line in listing.splitlines():
    if found := re.search(r'File "[^"]*/(\\w+[.]py)", line (\\d+)', line):
        place = (found[1], int(found[2]))
    elif found := re.search(r"(LDG|STG)[.]E(?:[.](64|128))?", line):
        way = "load" if found[1] == "LDG" else "store"
        machine.add((way, place, int(found[2] or 32)))
ptx = {(way, at[:2], bits) for way, at, bits in instructions(binary.asm["ptx"])}
vectors = {access for access in ptx if access[2] == 128}
assert len(vectors) > 4
assert vectors == {access for access in machine if access[2] == 128}
"""


def test_what_is_audited_is_what_is_launched() -> None:
    """To the bit; and its vectors are those of PTX, line by line."""
    command = [sys.executable, "-c", LAUNCHED, str(ROOT), str(ROOT / "perf")]
    done = subprocess.run(command, env=_compiling(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")
def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand where that can be done."""
    monkeypatch.undo()
    step = measure("sm_90", "RowwiseAdagrad", {}, torch.bfloat16, 256, "uniform")
    assert step.name == "rowwise_adagrad - bf16 256 uniform"
    assert step.programs == 32
    assert step.floor == step.moved == 128 * 256 * 2 + 2 * step.rows * (256 * 2 + 4)
    assert step.astray == 0
    assert step.order == 8 * 128
    assert step_findings(step) == []


# Before the loop a load of a table; in it two loads, of which one waits for the other, or not.
LOOP = """
    /*0000*/  LDG.E.64 R2, desc[UR4][R4.64] ;
    /*0010*/  S2R R0, SR_TID.X ;
    /*0020*/  IMAD.WIDE.U32 R6, R0, 0x10, R2 ;
    /*0030*/  @P0 LDG.E.128 R8, desc[UR4][R6.64] ;
    /*0040*/  LDG.E R20, desc[UR4][R4.64] ;
    /*0050*/  @P1 LDG.E.128 R12, desc[UR4][R6.64+0x800] ;
    /*0060*/  FADD R8, R8, R12 ;
    /*0070*/  @P2 STG.E.128 desc[UR4][R6.64], R8 ;
    /*0080*/  @P3 BRA 0x0020 ;
    /*0090*/  @P4 LDG.E.128 R24, desc[UR4][R6.64] ;
    /*00a0*/  @P4 STG.E.128 desc[UR4][R6.64], R24 ;
    /*00b0*/  @P5 BRA 0x0090 ;
    /*00c0*/  EXIT ;
"""
AMD_LOOP = """
kernel:
.LBB0_1:
\tv_lshlrev_b32_e32 v1, 4, v0
\tglobal_load_dwordx4 v[4:7], v1, s[0:1]
\ts_waitcnt vmcnt(0)
\tglobal_store_dwordx4 v1, v[4:7], s[0:1]
\ts_cbranch_vccnz .LBB0_1
\ts_endpgm
\t.amdhsa_kernel kernel
"""


def test_the_loop_over_blocks() -> None:
    """The first loop that stores, not the second; what is on its way, without the tables."""
    assert main_loop(parse_sass(LOOP)) == Loop(instructions=7, outstanding=32)
    waits = LOOP.replace("LDG.E R20, desc[UR4][R4.64]", "FADD R8, R8, R8")
    assert main_loop(parse_sass(waits)) == Loop(instructions=7, outstanding=16)
    assert main_loop(amdgcn(AMD_LOOP)) == Loop(instructions=5, outstanding=16)
    with pytest.raises(ValueError, match="no loop over blocks"):
        main_loop(parse_sass(LOOP.replace("BRA 0x0020", "NOP").replace("BRA 0x0090", "NOP")))


TTGIR = """
#loc1 = loc("/a/kernels/rows.py":78:26)
#loc2 = loc("/a/kernels/rows.py":220:92)
#loc3 = loc("param"(#loc1))
#loc4 = loc(callsite(#loc3 at #loc2))
#loc5 = loc("low")
  %a = tt.load %p, %m : tensor<16x64x!tt.ptr<f32>, #blocked> loc(#loc4)
  %b = tt.load %q : !tt.ptr<i64> loc(#loc2)
  tt.store %r, %v, %m : tensor<16x64x!tt.ptr<bf16>, #blocked> loc(#loc2)
"""
PTX = """
\t.loc\t1 78 26                          // rows.py:78:26 @[ rows.py:220:92 ]
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\t@%p1 ld.global.L1::evict_first.b32 { %r1 }, [ %rd1 + 0 ];
\t.loc\t1 220 92                         // rows.py:220:92
\tld.global.b64 { %rd48 }, [ %rd49 + 0 ];
\t@%p1 st.global.b16 [ %rd1 + 0 ], { %rs1 };
"""
AMDGCN = """
\t.loc\t1 78 26 is_stmt 1                ; rows.py:78:26 @[ rows.py:220:92 ]
\tglobal_load_dwordx4 v[4:7], v[48:49], off
\tbuffer_load_dword v1, v1, s[16:19], 0 offen
\t.loc\t1 220 92                         ; rows.py:220:92
\tglobal_load_dwordx2 v[4:5], v0, s[2:3]
\tglobal_store_short_d16_hi v[16:17], v8, off
"""


@pytest.mark.parametrize("text", [PTX, AMDGCN], ids=["PTX", "AMD"])
def test_loads_and_stores_of_rows(text: str) -> None:
    found = row_accesses(TTGIR, text, "16x64")
    assert found == [RowAccess(False, 32, (128, 32)), RowAccess(True, 16, (16,))]
    with pytest.raises(ValueError, match=r"no instruction for .*220"):
        row_accesses(TTGIR, text[: text.rindex("\t.loc")], "16x64")
