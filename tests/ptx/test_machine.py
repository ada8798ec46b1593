"""What the machine runs, and that each of its checks notices the fault that it is for."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine.access import Fault
from ptx_machine.global_memory import Spans
from ptx_machine.parser import UnknownPTX
from ptx_machine.sectors import Requests, total
from small_kernels import array, code, launch

LOAD = "ld.global.b32 %r10, [%rd2];"
STORE = "st.global.b32 [%rd2], %r10;"
BARRIER = "bar.sync 0;"
# Each thread's number goes to its neighbour's place, through shared memory.
EXCHANGE = f"""
    {LOAD}
    st.shared.b32 [%r7], %r10;
    {BARRIER}
    xor.b32 %r11, %r7, 128;
    ld.shared.b32 %r10, [%r11];
    {STORE}
"""
# Every program adds its number of threads' numbers; the last to finish adds the sums.
LAST_PROGRAM = """
    add.s32 %r10, %r3, 100;
    mul.wide.u32 %rd3, %r3, 4;
    add.s64 %rd4, %rd1, %rd3;
    setp.eq.b32 %p1, %r2, 0;
    @%p1 st.global.b32 [%rd4], %r10;
    bar.sync 0;
    mov.b32 %r11, 1;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r12, [%rd1 + 64], %r11;
    @%p1 st.shared.b32 [%r4], %r12;
    bar.sync 0;
    ld.shared.b32 %r12, [%r4];
    setp.ne.b32 %p2, %r12, 3;
    @%p2 bra $L__BB0_2;
    ld.global.b32 %r13, [%rd1];
    ld.global.b32 %r14, [%rd1 + 12];
    add.s32 %r15, %r13, %r14;
    @%p1 st.global.b32 [%rd1 + 32], %r15;
$L__BB0_2:
"""


def test_threads_and_programs_have_their_own() -> None:
    values = array(256)
    launch(f"{LOAD} add.s32 %r10, %r10, %r1; {STORE}", values, programs=4, argument=5)
    assert (values == np.arange(256) + 5).all()


def test_a_loop_and_a_predicate() -> None:
    values = array(64)
    body = f"""
        {LOAD}
        mov.b32 %r11, 0;
    $L__BB0_1:
        add.s32 %r11, %r11, 1;
        setp.lt.u32 %p1, %r10, 32;
        @!%p1 add.s32 %r10, %r10, 1;
        setp.lt.s32 %p2, %r11, 3;
        @%p2 bra $L__BB0_1;
        {STORE}
    """
    run = launch(body, values)
    numbers = np.arange(64)
    assert (values == np.where(numbers < 32, numbers, numbers + 3)).all()
    (program,) = run.programs
    assert program.n_instructions == 9 + 2 + 3 * 5 + 2


def test_through_shared_memory() -> None:
    values = array(64)
    launch(EXCHANGE, values)
    assert (values == (np.arange(64) ^ 32)).all()


def test_vectors_and_narrow_numbers() -> None:
    values = array(64)
    values[0] = 0x8000FF80
    body = """
        mul.wide.u32 %rd3, %r2, 0;
        add.s64 %rd4, %rd1, %rd3;
        ld.global.v2.b16 {%rs1, %rs2}, [%rd4];
        ld.global.b8 %rs3, [%rd4];
        cvt.s16.s8 %rs3, %rs3;
        mov.b32 %r10, {%rs2, %rs3};
        mov.b32 {%rs4, _}, %r10;
        mul.wide.u32 %rd5, %r10, 1;
        { .reg .b32 tmp; mov.b64 {tmp, %r12}, %rd5; }
        {
        .reg .b32 %temp;
        mov.b64 	{%r13, %temp}, %rd5;
        }
        cvt.u32.u16 %r11, %rs4;
        setp.eq.b32 %p1, %r2, 0;
        @%p1 st.global.v2.b32 [%rd4 + 8], {%r10, %r11};
        @%p1 st.global.v2.b32 [%rd4 + 16], {%r12, %r13};
    """
    launch(body, values)
    assert values[4] == 0
    assert values[5] == values[2]
    assert [hex(value) for value in values[2:4]] == ["0xff808000", "0x8000"]


def test_the_last_program_sees_what_all_stored() -> None:
    values = array(64)
    values[16] = 0
    launch(LAST_PROGRAM, values, programs=4)
    assert values[8] == 100 + 103
    assert values[16] == 4


def test_requests_and_sectors() -> None:
    """32 numbers in order fill 4 sectors, and touch 8 where there is another after each."""
    values = array(256)
    in_order = launch(f"{LOAD} {STORE}", values, programs=2)
    assert total(in_order.memory.log) == Requests(8, 32, 32)
    spread = "mad.wide.u32 %rd2, %r6, 8, %rd1;"
    apart = launch(f"{spread} {LOAD} {STORE}", values, programs=2)
    assert total(apart.memory.log) == Requests(8, 64, 32)


# What is planted, and what the machine says of it.
FAULTS = {
    "load beyond the end": ("ld.global.b32 %r10, [%rd2 + 4];", "load of 4 bytes at .* outside"),
    "load before the start": ("ld.global.b32 %r10, [%rd2 + -4];", "outside of every tensor"),
    "store beyond the end": ("st.global.b32 [%rd2 + 4], %r2;", "store of 4 bytes at .* outside"),
    "misaligned vector": ("ld.global.v2.b32 {%r10, %r11}, [%rd2];", "misaligned load of 8 bytes"),
    "misaligned number": ("ld.global.b32 %r10, [%rd1 + 2];", "misaligned load of 4 bytes"),
    "one place, many values": ("st.global.b32 [%rd1], %r2;", "different values in one place"),
    "shared memory's end": ("ld.shared.b32 %r10, [%r7 + 1024];", "outside of 1024 bytes"),
    "misaligned in shared memory": ("ld.shared.b64 %rd3, [%r7];", "misaligned load of 8 bytes"),
    "many values in shared memory": (
        f"st.shared.b32 [%r4], %r2; {BARRIER} ld.shared.b32 %r10, [%r4]; {STORE}",
        "other bits where programs run",
    ),
    "no barrier after a store": (EXCHANGE.replace(BARRIER, ""), "race in shared memory"),
    "no barrier after a load": (
        f"st.shared.b32 [%r7], %r2; {BARRIER} xor.b32 %r11, %r7, 128;"
        "ld.shared.b32 %r10, [%r11]; st.shared.b32 [%r7], %r10;",
        "race in shared memory: thread .* store of what thread .* loaded",
    ),
    "what nobody stored": (f"ld.shared.b32 %r10, [%r7]; {STORE}", "other bits where programs run"),
    "a race in a program": (
        f"{LOAD} xor.b32 %r11, %r2, 1; mad.wide.u32 %rd3, %r11, 4, %rd1;"
        "ld.global.b32 %r12, [%rd3]; add.s32 %r10, %r10, %r12; st.global.b32 [%rd2], %r10;",
        "race at .*: thread",
    ),
    "a hang": ("\n$L__BB0_1:\nbra $L__BB0_1;", "does not end"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str) -> None:
    body, message = FAULTS[name]
    values = array(64)
    with pytest.raises(Fault, match=message):
        launch(body, values)
    assert (values == np.arange(64)).all(), "a launch with a fault leaves memory alone"


def test_a_fault_names_the_instruction_and_the_source() -> None:
    with pytest.raises(Fault, match=r"program 0: ld\.global\.b32 %r10, .* line 26, small\.py:7"):
        launch("ld.global.b32 %r10, [%rd2 + 4];", array(64))


def test_a_store_where_only_loads_are_allowed() -> None:
    table, values = array(64), array(64)
    launch(LOAD, values, readonly=[table])
    with pytest.raises(Fault, match="store of 4 bytes"):
        launch(STORE, values, readonly=[table])


def test_programs_that_share_memory_without_order() -> None:
    body = "ld.global.b32 %r10, [%rd1]; setp.eq.b32 %p1, %r2, 0; @%p1 st.global.b32 [%rd2], %r10;"
    with pytest.raises(Fault, match=r"race at .*program 1"):
        launch(body.replace("[%rd2]", "[%rd1]"), array(128), programs=2)


def test_an_atomic_without_a_barrier_orders_nothing() -> None:
    values = array(64)
    values[16] = 0
    first, second = LAST_PROGRAM.split("bar.sync 0;", 1)
    stored_by_another = first.replace("setp.eq.b32 %p1, %r2, 0;", "setp.eq.b32 %p1, %r2, 33;")
    second = "setp.eq.b32 %p1, %r2, 0;" + second
    launch(f"{stored_by_another} bar.sync 0; {second}", values, programs=4)
    values[16] = 0
    with pytest.raises(Fault, match="race at"):
        launch(stored_by_another + second, values, programs=4)


def test_the_order_of_programs_shows() -> None:
    """Each draws a number and stores it: right in no order but one."""
    body = f"""
        mov.b32 %r11, 1;
        setp.eq.b32 %p1, %r2, 0;
        @%p1 atom.global.gpu.acq_rel.add.u32 %r10, [%rd1 + 508], %r11;
        @%p1 {STORE}
    """
    with pytest.raises(Fault, match="other bits where programs run in descending order"):
        launch(body, array(128), programs=2)


def test_a_load_of_which_nothing_depends_is_no_race() -> None:
    """Two threads hold one number: both load it, one stores it."""
    body = """
        and.b32 %r11, %r2, 31;
        mad.wide.u32 %rd3, %r11, 4, %rd1;
        ld.global.b32 %r10, [%rd3];
        add.s32 %r10, %r10, 1;
        setp.lt.u32 %p1, %r2, 32;
        @%p1 st.global.b32 [%rd3], %r10;
    """
    values = array(64)
    launch(body, values)
    assert (values[:32] == np.arange(32) + 1).all()


UNKNOWN = {
    "instruction": ("sin.approx.f32 %r10, %r2;", "was not taught: sin.approx.f32 %r10, %r2"),
    "rounding": ("add.rz.f32 %r10, %r2, %r3;", "was not taught"),
    "type": ("add.bf16 %rs1, %rs2, %rs3;", "was not taught"),
    "width": ("add.s32 %r10, %r2, %rd1;", "%rd1 of 64 bits as s32"),
    "operands": ("add.s32 %r10, %r2;", "add.s32"),
    "float": ("add.f64 %rd3, %rd1, 0f3F800000;", "0f3F800000 as f64"),
    "order of atomics": (
        "atom.global.gpu.relaxed.add.u32 %r10, [%rd2], %r1;", "an atomic of another kind"
    ),
    "scope of atomics": ("atom.global.cta.acq_rel.add.u32 %r10, [%rd2], %r1;", "another kind"),
    "compare and swap": ("atom.global.gpu.acq_rel.cas.b32 %r10, [%rd2], %r1, %r2;", "cas"),
    "barrier": ("bar.sync 1, 32;", "a barrier of some threads"),
    "lanes": ("@%p1 shfl.sync.bfly.b32 %r10, %r2, 1, 31, -1;", "of some lanes"),
    "vector": ("ld.global.v4.b32 {%r10, %r11}, [%rd2];", "an access with"),
    "modifier": ("ld.global.nc.b32 %r10, [%rd2];", "an access with"),
    "space": ("ld.local.b32 %r10, [%rd2];", "was not taught"),
    "label": ("bra $L__tmp1;", "tmp1"),
    "text": ("{ .reg .b32 t; }", "PTX line 26"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_machine_does_not_know_raises(name: str) -> None:
    body, message = UNKNOWN[name]
    with pytest.raises(UnknownPTX, match=message):
        code(body)


def test_what_is_unknown_names_the_instruction_and_the_source() -> None:
    with pytest.raises(UnknownPTX, match=r"sin\.approx.*PTX line 26, small\.py:7"):
        code("sin.approx.f32 %r10, %r2;")


def test_a_shuffle_of_some_lanes_raises() -> None:
    with pytest.raises(UnknownPTX, match="of some lanes"):
        launch("shfl.sync.bfly.b32 %r10, %r2, 1, 31, %r2;", array(64))


def test_a_branch_that_some_threads_take_raises() -> None:
    with pytest.raises(UnknownPTX, match="a branch that some threads"):
        launch("setp.eq.b32 %p1, %r2, 0; @%p1 bra $L__BB0_1;\n$L__BB0_1:", array(64))


def test_what_is_said_of_an_address_beyond_all() -> None:
    """One that no int64 holds."""
    said = Spans({(4096, 8192)}).around(2**64 - 8)
    assert (
        said == f"{2**64 - 8 - 4096} bytes from the start and {2**64 - 8 - 8192} from the end "
        "of the nearest, of 4096 bytes"
    )
