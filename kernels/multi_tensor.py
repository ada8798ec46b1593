"""The one dense update kernel: find my chunk, and for each of its blocks load, RULE, store."""

import triton
import triton.language as tl

from .chunks import (
    BESIDE,
    FIRST,
    FORMAT_WIDTH,
    GROUP,
    PARAM,
    RANDOM,
    find_chunk,
    in_dtype,
    pointer,
    scalars,
)
from .conditions import clip_coef, inv_scale, step_is_taken
from .formats import FLOAT64, load, pointer_beside, store, stored_pointer
from .numerics import decode, encode


def _launch_metadata(grid, metadata, args):
    """What Triton's profiler shows beside a launch's time."""
    return {"name": f"{metadata.name}.{args['RULE'].__name__}", "bytes": round(args["n_bytes"])}


@triton.jit
def _update_block(
    ptrs,
    beside_ptrs,
    grad_ptr,
    first,
    start,
    remaining,
    hyper,
    step,
    random,
    unscale,
    clip,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    FORMATS: tl.constexpr,
    N_STATES: tl.constexpr,
    SHARDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVICTION: tl.constexpr,
    MASKED: tl.constexpr,
):
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if FORMATS & 15 == FLOAT64 else tl.float32
    offsets = start + tl.arange(0, BLOCK_SIZE)
    mask = offsets < remaining if MASKED else None
    param = load(
        ptrs[0], beside_ptrs[0], start, remaining, mask, FORMATS & 15, COMPUTE_DTYPE, BLOCK_SIZE, ""
    )
    grad = tl.load(grad_ptr + offsets, mask=mask, eviction_policy=EVICTION)
    grad = decode(grad, COMPUTE_DTYPE)
    if unscale is not None:
        grad = grad * unscale
        tl.store(grad_ptr + offsets, encode(grad, grad_ptr.dtype.element_ty), mask=mask)
    if clip is not None:
        grad = grad * clip
    state = ()
    for i in tl.static_range(1, N_STATES + 1):
        value = load(
            ptrs[i], beside_ptrs[i], start, remaining, mask, FORMATS >> 4 * i & 15, COMPUTE_DTYPE,
            BLOCK_SIZE, EVICTION,
        )  # fmt: skip
        state = state + (value,)
    param, state = RULE(param, grad, state, hyper, step, FLAGS)
    tl.static_assert(len(state) == N_STATES, "a rule returns as many states as it has")
    values = (param,) + state
    for i in tl.static_range(N_STATES + 1):
        store(
            ptrs[i], beside_ptrs[i], start, remaining, mask, values[i], random, first, i,
            FORMATS >> 4 * i & 15, SHARDING, EVICTION if i > 0 else "",
        )  # fmt: skip


@triton.jit(launch_metadata=_launch_metadata)
def multi_tensor_kernel(
    block_to_tensor_ptr,
    tensor_table_ptr,
    format_table_ptr,
    grads_ptr,
    hyperparameters_ptr,
    steps_ptr,
    found_inf_ptr,
    grad_scale_ptr,
    grad_norm_ptr,
    max_norm_ptr,
    step_status_ptr,
    n_bytes,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
    N_STATES: tl.constexpr,
    FORMATS: tl.constexpr,
    SHARDING: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    DOUBLES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TAIL_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Update every tensor that owns a program, in place, each element once.

    A program updates one chunk: BLOCKS blocks of BLOCK_SIZE elements.

    Preconditions, none of which the kernel can check:

    - block_to_tensor_ptr: int32, one a program: its tensor. The programs of a tensor follow one
      another, as many as it has chunks;
    - tensor_table_ptr: int64 [tensors, ROW_WIDTH], the columns of chunks.py;
    - format_table_ptr: int64 [tensors, FORMAT_WIDTH], the columns there, of which SHARDING says how
      to read RANDOM; None where FORMATS has dtypes of torch alone, rounded to nearest;
    - grads_ptr: int64 [tensors], addresses of gradients; a tensor at 0 is left alone;
    - hyperparameters_ptr: float64 [groups, N_HYPERS];
    - steps_ptr: float64 [tensors, STEP_COLUMNS], the last how often a tensor was updated, or None
      where nothing reads it; of several RULE is given the others, as a tuple if there are several;
    - found_inf_ptr, grad_scale_ptr, grad_norm_ptr, max_norm_ptr: see conditions.py. A skipped step
      writes nothing; gradients are divided by the scale in memory too, and are not clipped there;
    - step_status_ptr: float32 [2], or None; becomes (1, 0) or, of a skipped step, (0, 1);
    - n_bytes: float, what the launch loads and stores of the tensors; for a profiler alone;
    - every table starts at a multiple of 16 bytes;
    - every address points to numel dense elements of its dtype, in the memory order of the
      parameter; ALIGNED promises that each is a multiple of 16 bytes.

    RULE is given hyperparameters and step as float64 scalars with DOUBLES, and otherwise in
    arithmetic precision. EVICTION is the cache's policy for gradients and state: nothing reads them
    before the next step.
    """
    CHUNK: tl.constexpr = BLOCKS * BLOCK_SIZE
    tensor, row_ptr, start, remaining = find_chunk(
        block_to_tensor_ptr, tensor_table_ptr, FIRST, CHUNK
    )
    grad_address = tl.load(grads_ptr + tensor)
    remaining = tl.where(grad_address == 0, 0, remaining)
    if step_status_ptr is not None:
        taken = step_is_taken(found_inf_ptr, grad_norm_ptr, SKIP_NONFINITE)
        remaining = tl.where(taken, remaining, 0)
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if FORMATS & 15 == FLOAT64 else tl.float32
    unscale = None
    if grad_scale_ptr is not None:
        unscale = inv_scale(grad_scale_ptr, COMPUTE_DTYPE)
    clip = None
    if max_norm_ptr is not None:
        clip = clip_coef(grad_norm_ptr, max_norm_ptr, COMPUTE_DTYPE)

    hyper = scalars(hyperparameters_ptr + tl.load(row_ptr + GROUP) * N_HYPERS, N_HYPERS)
    step = None
    random = None
    if steps_ptr is not None:
        if STEP_COLUMNS < 3:
            step = tl.load(steps_ptr + tensor * STEP_COLUMNS).to(tl.float64)
        else:
            step = scalars(steps_ptr + tensor * STEP_COLUMNS, STEP_COLUMNS - 1)
    if format_table_ptr is not None:
        format_ptr = format_table_ptr + tensor * FORMAT_WIDTH
        if steps_ptr is not None:
            updates = tl.load(steps_ptr + (tensor + 1) * STEP_COLUMNS - 1).to(tl.int64)
            random = scalars(format_ptr + RANDOM, 4) + (updates,)
    if not DOUBLES:
        hyper = in_dtype(hyper, COMPUTE_DTYPE)
        if step is not None:
            step = step.to(COMPUTE_DTYPE) if STEP_COLUMNS < 3 else in_dtype(step, COMPUTE_DTYPE)

    grad_ptr = pointer(grad_address, start, GRAD_DTYPE, ALIGNED)
    ptrs, beside_ptrs = (), ()
    for i in tl.static_range(N_STATES + 1):
        ptr = stored_pointer(tl.load(row_ptr + PARAM + i), start, FORMATS >> 4 * i & 15, ALIGNED)
        ptrs = ptrs + (ptr,)
        if format_table_ptr is not None:
            address = tl.load(format_ptr + BESIDE + i)
            beside_ptr = pointer_beside(address, start, FORMATS >> 4 * i & 15, ALIGNED)
            beside_ptrs = beside_ptrs + (beside_ptr,)
        else:
            beside_ptrs = ptrs

    # A mask that is not known at compile time costs the vector loads: only the last chunk has one.
    if remaining >= CHUNK:
        for block in tl.range(0, BLOCKS, num_stages=NUM_STAGES):
            _update_block(
                ptrs, beside_ptrs, grad_ptr, start, block * BLOCK_SIZE, remaining, hyper, step,
                random, unscale, clip, RULE, FLAGS, FORMATS, N_STATES, SHARDING, BLOCK_SIZE,
                EVICTION, MASKED=False,
            )  # fmt: skip
    else:
        rest = remaining.to(tl.int32)
        for block in tl.range(0, tl.cdiv(rest, TAIL_SIZE) if CHUNK > TAIL_SIZE else 1):
            _update_block(
                ptrs, beside_ptrs, grad_ptr, start, block * TAIL_SIZE, rest, hyper, step,
                random, unscale, clip, RULE, FLAGS, FORMATS, N_STATES, SHARDING, TAIL_SIZE,
                EVICTION, MASKED=True,
            )  # fmt: skip

    # Last: after a store, AMD's compiler takes addresses that are loaded for a thread's own.
    if step_status_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(step_status_ptr, taken.to(tl.float32))
            tl.store(step_status_ptr + 1, 1 - taken.to(tl.float32))
