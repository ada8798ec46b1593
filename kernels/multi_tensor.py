"""The one dense update kernel: find my block, load, RULE, store. A program owns one block."""

import triton
import triton.language as tl

from .numerics import narrow, widen

# Columns of a row of the tensor table; the addresses of up to MAX_STATES states follow.
NUMEL = tl.constexpr(0)
GROUP = tl.constexpr(1)
PARAM = tl.constexpr(2)
STATES = tl.constexpr(3)
MAX_STATES = tl.constexpr(3)
ROW_WIDTH = tl.constexpr(6)


@triton.jit
def _pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor of DTYPE that begins at an int64 address."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _update_block(
    param_ptr,
    grad_ptr,
    state_ptrs,
    remaining,
    hyper,
    step,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    N_STATES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    COMPUTE_DTYPE: tl.constexpr = (
        tl.float64 if param_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    offsets = tl.arange(0, BLOCK_SIZE)
    mask = offsets < remaining if MASKED else None
    param = widen(tl.load(param_ptr + offsets, mask=mask), COMPUTE_DTYPE)
    grad = widen(tl.load(grad_ptr + offsets, mask=mask), COMPUTE_DTYPE)
    state = ()
    for i in tl.static_range(N_STATES):
        state = state + (widen(tl.load(state_ptrs[i] + offsets, mask=mask), COMPUTE_DTYPE),)
    param, state = RULE(param, grad, state, hyper, step, FLAGS)
    tl.store(param_ptr + offsets, narrow(param, param_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(N_STATES):
        state_ptr = state_ptrs[i]
        tl.store(state_ptr + offsets, narrow(state[i], state_ptr.dtype.element_ty), mask=mask)


@triton.jit
def multi_tensor_kernel(
    blocks_ptr,
    rows_ptr,
    grads_ptr,
    hypers_ptr,
    steps_ptr,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Update every tensor that the block table names, in place, each element once.

    Preconditions, none of which the kernel can check:

    - blocks_ptr: int64, one a program: tensor << 32 | block. No pair twice;
    - rows_ptr: int64 [tensors, ROW_WIDTH], the columns above;
    - grads_ptr: int64 [tensors], addresses of gradients;
    - hypers_ptr: float64 [groups, N_HYPERS];
    - steps_ptr: floating [tensors], or None where RULE reads no step;
    - every table starts at a multiple of 16 bytes;
    - every address points to numel dense elements of its dtype, in the memory order of the
      parameter; ALIGNED promises that each is a multiple of 16 bytes.
    """
    entry = tl.load(blocks_ptr + tl.program_id(0))
    tensor = entry >> 32
    start = (entry & 0xFFFFFFFF) * BLOCK_SIZE
    row_ptr = rows_ptr + tensor * ROW_WIDTH
    remaining = tl.load(row_ptr + NUMEL) - start

    hyper = ()
    group_ptr = hypers_ptr + tl.load(row_ptr + GROUP) * N_HYPERS
    for i in tl.static_range(N_HYPERS):
        hyper = hyper + (tl.load(group_ptr + i),)
    step = None
    if steps_ptr is not None:
        step = tl.load(steps_ptr + tensor).to(tl.float64)

    param_ptr = _pointer(tl.load(row_ptr + PARAM), start, PARAM_DTYPE, ALIGNED)
    grad_ptr = _pointer(tl.load(grads_ptr + tensor), start, GRAD_DTYPE, ALIGNED)
    state_ptrs = ()
    for i in tl.static_range(N_STATES):
        address = tl.load(row_ptr + STATES + i)
        state_ptrs = state_ptrs + (_pointer(address, start, STATE_DTYPE, ALIGNED),)

    # A mask that is not known at compile time costs the vector loads: only the last block has one.
    if remaining >= BLOCK_SIZE:
        _update_block(
            param_ptr, grad_ptr, state_ptrs, remaining, hyper, step,
            RULE, FLAGS, N_STATES, BLOCK_SIZE, MASKED=False,
        )  # fmt: skip
    else:
        _update_block(
            param_ptr, grad_ptr, state_ptrs, remaining, hyper, step,
            RULE, FLAGS, N_STATES, BLOCK_SIZE, MASKED=True,
        )  # fmt: skip
