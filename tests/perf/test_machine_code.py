"""The path of whole blocks, and the loop over rows, in code that can be counted by hand."""

from __future__ import annotations

import pytest
from lab.disassembly import amdgcn, parse_sass
from lab.machine_code import Code, MainPath
from lab.row_code import Loop, RowAccess, main_loop, row_accesses

# A block is 16 bytes a thread. Whole blocks: around a loop, which may call. The rest: under a mask.
SASS = """
    /*0000*/  S2R R0, SR_TID.X ;
    /*0010*/  LDG.E.64 R2, desc[UR4][R4.64] ;
    /*0020*/  IMAD.WIDE.U32 R2, R0, 0x4, R2 ;
    /*0030*/  @!P0 BRA 0x0120 ;
    /*0040*/  LDG.E.128 R8, desc[UR4][R2.64] ;
    /*0050*/  LDG.E.128 R12, desc[UR4][R2.64+0x800] ;
    /*0060*/  FADD R8, R8, R12 ;
    /*0070*/  MUFU.RSQ R9, R8 ;
    /*0080*/  @!P1 BRA 0x00c0 ;
    /*0090*/  MOV R20, 0xb0 ;
    /*00a0*/  CALL.REL.NOINC 0x0160 ;
    /*00b0*/  BRA 0x00d0 ;
    /*00c0*/  FMUL R8, R8, R9 ;
    /*00d0*/  STG.E.128 desc[UR4][R2.64], R8 ;
    /*00e0*/  @!P2 EXIT ;
    /*00f0*/  IADD3 R2, R2, 0x10, RZ ;
    /*0100*/  BRA 0x0040 ;
    /*0110*/  BRA 0x0110 ;
    /*0120*/  @P3 LDG.E R8, desc[UR4][R2.64] ;
    /*0130*/  @P3 STG.E desc[UR4][R2.64], R8 ;
    /*0140*/  @P4 STG.E desc[UR4][R2.64+0x4], R8 ;
    /*0150*/  EXIT ;
    /*0160*/  FADD R8, R8, 1 ;
    /*0170*/  @P5 BRA 0x0190 ;
    /*0180*/  FADD R8, R8, 2 ;
    /*0190*/  RET.REL.NODEC R20 0x0 ;
"""

AMDGCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\tv_lshlrev_b32_e32 v1, 4, v0
\ts_cbranch_vccnz .LBB0_2
; %bb.1:
\tbuffer_load_dwordx4 v[4:7], v1, s[0:3], 0 offen
\tv_mov_b32_e32 v2, 0                      ; as long as nothing reads v4
\tbuffer_load_dwordx4 v[8:11], v1, s[8:11], 0 offen offset:2048
\ts_waitcnt vmcnt(0)
\tv_add_f32_e32 v4, v4, v8
\tbuffer_store_dwordx4 v[4:7], v1, s[0:3], 0 offen
\ts_endpgm
.LBB0_2:
\tbuffer_load_ushort v4, v1, s[0:3], 0 offen
\ts_endpgm
\t.amdhsa_kernel kernel
"""


def _main_path(listing: str, stored: int) -> MainPath:
    path = Code(parse_sass(listing)).main_path(stored)
    assert path is not None
    return path


def test_around_a_loop() -> None:
    """4 instructions before it, 8 a block and 2 to go around; 3 to a subroutine of 4 and back."""
    for blocks in (1, 2, 5):
        path = _main_path(SASS, 16 * blocks)
        assert path.instructions == 4 + 8 * blocks + 2 * (blocks - 1)
        assert path.detours == (3 + 4) * blocks
        assert path.loads == (16, 16) * blocks
        assert path.stores == (16,) * blocks
        assert path.outstanding == 32


def test_a_load_that_waits_for_another() -> None:
    both = "LDG.E.128 R12, desc[UR4][R2.64+0x800] ;\n    /*0060*/  FADD R8, R8, R12"
    assert both in SASS
    one = "FADD R8, R8, R8 ;\n    /*0060*/  LDG.E.128 R12, desc[UR4][R2.64+0x800]"
    assert _main_path(SASS.replace(both, one), 16).outstanding == 16


def test_a_call_that_cannot_be_avoided() -> None:
    path = _main_path(SASS.replace("@!P1 BRA 0x00c0", "NOP"), 16)
    assert path.instructions == 4 + 10 + 4
    assert path.detours == 0


def test_all_stores_under_a_mask() -> None:
    assert Code(parse_sass(SASS.replace("STG.E.128", "@P6 STG.E.128"))).main_path(16) is None
    assert Code(parse_sass(SASS)).main_path(8) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "IMAD.WIDE.U32 R2, R0, 0x4, R2",
            "@P6 BRA 0x0010",
            "a loop on the main path stores nothing",
        ),
        ("FADD R8, R8, 2", "@P6 BRA 0x0160", "a loop in a subroutine"),
        ("BRA 0x0040", "BRX R2 -0x40", "a jump that is not followed"),
    ],
)
def test_what_cannot_be_counted(old: str, new: str, message: str) -> None:
    assert old in SASS
    with pytest.raises(ValueError, match=message):
        Code(parse_sass(SASS.replace(old, new))).main_path(16)


def test_amd() -> None:
    assert Code(amdgcn(AMDGCN)).main_path(16) == MainPath(
        instructions=10, detours=0, loads=(16, 16), stores=(16,), outstanding=32
    )


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
    called = LOOP.replace("@P3 BRA 0x0020", "CALL.REL.NOINC 0x0020")  # for good, as sm_80 does
    assert main_loop(parse_sass(called)) == Loop(instructions=7, outstanding=32)
    assert main_loop(amdgcn(AMD_LOOP)) == Loop(instructions=5, outstanding=16)
    with pytest.raises(ValueError, match="no loop over blocks"):
        main_loop(parse_sass(LOOP.replace("BRA 0x0020", "NOP").replace("BRA 0x0090", "NOP")))


def test_registers_of_a_result() -> None:
    """A pair for 64 bits, but an integer made of a float64 is one."""
    for opcode, registers in (("DADD", {"R2", "R3"}), ("F2F.F64.F32", {"R2", "R3"}),
                              ("F2I.F64.TRUNC", {"R2"}), ("FADD", {"R2"})):  # fmt: skip
        (code,) = parse_sass(f"    /*0000*/  {opcode} R2, R4 ;")
        assert code.writes == registers


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
AMDGCN_ROWS = """
\t.loc\t1 78 26 is_stmt 1                ; rows.py:78:26 @[ rows.py:220:92 ]
\tglobal_load_dwordx4 v[4:7], v[48:49], off
\tbuffer_load_dword v1, v1, s[16:19], 0 offen
\t.loc\t1 220 92                         ; rows.py:220:92
\tglobal_load_dwordx2 v[4:5], v0, s[2:3]
\tglobal_store_short_d16_hi v[16:17], v8, off
"""


@pytest.mark.parametrize("text", [PTX, AMDGCN_ROWS], ids=["PTX", "AMD"])
def test_loads_and_stores_of_rows(text: str) -> None:
    found = row_accesses(TTGIR, text, "16x64")
    assert found == [RowAccess(False, 32, (128, 32)), RowAccess(True, 16, (16,))]
    with pytest.raises(ValueError, match=r"no instruction for .*220"):
        row_accesses(TTGIR, text[: text.rindex("\t.loc")], "16x64")
