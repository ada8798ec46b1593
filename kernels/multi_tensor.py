"""The one dense update kernel: find my chunk, and for each of its blocks load, RULE, store."""

import triton
import triton.language as tl

from .numerics import narrow, widen

# Columns of a row of the tensor table; the addresses of up to MAX_STATES states follow.
NUMEL = tl.constexpr(0)
GROUP = tl.constexpr(1)
FIRST = tl.constexpr(2)  # program of the launch
PARAM = tl.constexpr(3)
STATES = tl.constexpr(4)
MAX_STATES = tl.constexpr(3)
ROW_WIDTH = tl.constexpr(8)


def _launch_metadata(grid, metadata, args):
    """What Triton's profiler shows beside a launch's time."""
    return {"name": f"{metadata.name}.{args['RULE'].__name__}", "bytes": round(args["n_bytes"])}


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
    start,
    remaining,
    hyper,
    step,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    N_STATES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVICTION: tl.constexpr,
    MASKED: tl.constexpr,
):
    COMPUTE_DTYPE: tl.constexpr = (
        tl.float64 if param_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    offsets = start + tl.arange(0, BLOCK_SIZE)
    mask = offsets < remaining if MASKED else None
    param = widen(tl.load(param_ptr + offsets, mask=mask), COMPUTE_DTYPE)
    grad = tl.load(grad_ptr + offsets, mask=mask, eviction_policy=EVICTION)
    grad = widen(grad, COMPUTE_DTYPE)
    state = ()
    for i in tl.static_range(N_STATES):
        value = tl.load(state_ptrs[i] + offsets, mask=mask, eviction_policy=EVICTION)
        state = state + (widen(value, COMPUTE_DTYPE),)
    param, state = RULE(param, grad, state, hyper, step, FLAGS)
    tl.store(param_ptr + offsets, narrow(param, param_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(N_STATES):
        pointer = state_ptrs[i] + offsets
        value = narrow(state[i], pointer.dtype.element_ty)
        tl.store(pointer, value, mask=mask, eviction_policy=EVICTION)


@triton.jit(launch_metadata=_launch_metadata)
def multi_tensor_kernel(
    owners_ptr,
    rows_ptr,
    grads_ptr,
    hypers_ptr,
    steps_ptr,
    n_bytes,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Update every tensor that owns a program, in place, each element once.

    A program updates one chunk: BLOCKS blocks of BLOCK_SIZE elements.

    Preconditions, none of which the kernel can check:

    - owners_ptr: int32, one a program: its tensor. The programs of a tensor follow one another, as
      many as it has chunks;
    - rows_ptr: int64 [tensors, ROW_WIDTH], the columns above;
    - grads_ptr: int64 [tensors], addresses of gradients;
    - hypers_ptr: float64 [groups, N_HYPERS];
    - steps_ptr: floating [tensors], or None where RULE reads no step;
    - n_bytes: float, what the launch loads and stores of the tensors; for a profiler alone;
    - every table starts at a multiple of 16 bytes;
    - every address points to numel dense elements of its dtype, in the memory order of the
      parameter; ALIGNED promises that each is a multiple of 16 bytes.

    EVICTION is the cache's policy for gradients and state: nothing reads them before the next step.
    """
    program = tl.program_id(0)
    tensor = tl.load(owners_ptr + program).to(tl.int64)
    row_ptr = rows_ptr + tensor * ROW_WIDTH
    start = (program - tl.load(row_ptr + FIRST)) * (BLOCKS * BLOCK_SIZE)
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

    # A mask that is not known at compile time costs the vector loads: only the last chunk has one.
    if remaining >= BLOCKS * BLOCK_SIZE:
        for block in tl.range(0, BLOCKS, num_stages=NUM_STAGES):
            _update_block(
                param_ptr, grad_ptr, state_ptrs, block * BLOCK_SIZE, remaining, hyper, step,
                RULE, FLAGS, N_STATES, BLOCK_SIZE, EVICTION, MASKED=False,
            )  # fmt: skip
    else:
        rest = remaining.to(tl.int32)
        for block in tl.range(0, tl.cdiv(rest, BLOCK_SIZE) if BLOCKS > 1 else 1):
            _update_block(
                param_ptr, grad_ptr, state_ptrs, block * BLOCK_SIZE, rest, hyper, step,
                RULE, FLAGS, N_STATES, BLOCK_SIZE, EVICTION, MASKED=True,
            )  # fmt: skip
