"""Kernels of a few lines of PTX, and their launches over one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ptx_machine.floats import Array
from ptx_machine.global_memory import Spans
from ptx_machine.grid import Launch, Run
from ptx_machine.program import Code

SHARED_BYTES = 1024
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry small(
	.param .u64 .ptr .global .align 1 small_param_0,
	.param .u32 small_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<30>;
	.reg .b64 	%rd<9>;
	.loc	1 7 4
	ld.param.b64 	%rd1, [small_param_0];
	ld.param.b32 	%r1, [small_param_1];
	mov.u32 	%r2, %tid.x;
	mov.u32 	%r3, %ctaid.x;
	mov.b32 	%r4, memory;
	shl.b32 	%r5, %r2, 2;
	mad.lo.s32 	%r6, %r3, {threads}, %r2;
	mad.wide.u32 	%rd2, %r6, 4, %rd1;  // this thread's number in the array
	add.s32 	%r7, %r4, %r5;  // and in shared memory
"""
TAIL = """
}
	.file	1 "/somewhere/small.py"
"""


def code(body: str, threads: int = 64) -> Code:
    """Of statements that find what HEAD set; it ends the program."""
    return Code(HEAD.format(threads=threads) + body + "\nret;" + TAIL)


def array(n: int) -> Array:
    """0, 1, 2... at a multiple of 64 bytes."""
    memory = np.zeros(n + 16, np.uint32)
    start = -memory.ctypes.data % 64 // 4
    values = memory[start : start + n]
    values[:] = np.arange(n)
    return values


def launch(
    body: str,
    values: Array,
    programs: int = 1,
    threads: int = 64,
    readonly: Sequence[Array] = (),
    argument: int = 0,
) -> Run:
    """Run over an array, and leave there what it stores."""
    start = values.ctypes.data
    writable = [(start, start + values.nbytes)]
    readable = [*writable, *((a.ctypes.data, a.ctypes.data + a.nbytes) for a in readonly)]
    address = readonly[0].ctypes.data if readonly else start
    return Launch(
        code(body, threads),
        (programs, 1, 1),
        [address, argument],
        SHARED_BYTES,
        Spans(readable),
        Spans(writable),
    ).run()
