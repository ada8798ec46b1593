"""The norm of many gradients in one launch, and their scaling in another."""

import triton
import triton.language as tl

from .chunks import NORM_FIRST, find_chunk, pointer
from .conditions import clip_coef, inv_scale
from .numerics import decode, encode

# Partial sums that the last program adds at a time. Not as many as a block of gradients has
# elements: Triton would give both one layout, which misaligned gradients cannot afford.
PARTIALS_BLOCK = tl.constexpr(512)


@triton.jit
def _sum_of_squares(
    grad_ptr,
    remaining,
    unscale,
    blocks,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    offsets = tl.arange(0, BLOCK_SIZE)
    squares = tl.zeros((BLOCK_SIZE,), COMPUTE_DTYPE)
    # As in the update: a mask that is not known at compile time costs the vector loads.
    if remaining >= blocks * BLOCK_SIZE:
        for block in tl.range(0, blocks):
            grad = decode(tl.load(grad_ptr + block * BLOCK_SIZE + offsets), COMPUTE_DTYPE)
            if unscale is not None:
                grad = grad * unscale
            squares += grad * grad
    else:
        rest = remaining.to(tl.int32)
        for block in tl.range(0, tl.cdiv(rest, BLOCK_SIZE)):
            at = block * BLOCK_SIZE + offsets
            grad = decode(tl.load(grad_ptr + at, mask=at < rest, other=0.0), COMPUTE_DTYPE)
            if unscale is not None:
                grad = grad * unscale
            squares += grad * grad
    return tl.sum(squares)


def _launch_metadata(grid, metadata, args):
    """What Triton's profiler shows beside a launch's time."""
    return {"name": metadata.name, "bytes": round(args["n_bytes"])}


@triton.jit(launch_metadata=_launch_metadata, do_not_specialize=["blocks"])
def norm_kernel(
    block_to_tensor_ptr,
    tensor_table_ptr,
    grads_ptr,
    partials_ptr,
    arrival_count_ptr,
    sum_ptr,
    norm_ptr,
    grad_scale_ptr,
    n_bytes,
    blocks,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The sum of squares of every gradient that owns a program, and its root.

    Every program stores a partial sum; whichever is the last to finish adds them, always in the
    order of programs: the same gradients give the same bits.

    Preconditions, beside those of `multi_tensor_kernel` for the first three (a gradient at 0 counts
    as zeros):

    - partials_ptr: float64, one a program;
    - arrival_count_ptr: int32, 0; it is 0 again afterwards. No other launch uses it meanwhile;
    - sum_ptr, norm_ptr: float64, written; with ACCUMULATE, what `sum_ptr` holds is added;
    - grad_scale_ptr: see conditions.py;
    - n_bytes: float, what the launch loads of the gradients; for a profiler alone.
    """
    chunk = blocks * BLOCK_SIZE
    tensor, _, start, remaining = find_chunk(
        block_to_tensor_ptr, tensor_table_ptr, NORM_FIRST, chunk
    )
    grad_address = tl.load(grads_ptr + tensor)
    remaining = tl.where(grad_address == 0, 0, remaining)
    grad_ptr = pointer(grad_address, start, DTYPE, ALIGNED)
    unscale = None
    if grad_scale_ptr is not None:  # before it is squared, or a large scale would overflow
        unscale = inv_scale(grad_scale_ptr, tl.float64 if DTYPE == tl.float64 else tl.float32)
    partial = _sum_of_squares(grad_ptr, remaining, unscale, blocks, DTYPE, BLOCK_SIZE)
    tl.store(partials_ptr + tl.program_id(0), partial.to(tl.float64))

    # Acquire and release: the program that draws the last number sees all that was stored before.
    n_programs = tl.num_programs(0)
    if tl.atomic_add(arrival_count_ptr, 1, sem="acq_rel", scope="gpu") == n_programs - 1:
        offsets = tl.arange(0, PARTIALS_BLOCK)
        sums = tl.zeros((PARTIALS_BLOCK,), tl.float64)
        for first in tl.range(0, n_programs, PARTIALS_BLOCK):
            at = first + offsets
            sums += tl.load(
                partials_ptr + at, mask=at < n_programs, other=0.0, cache_modifier=".cg"
            )
        total = tl.sum(sums)
        if ACCUMULATE:
            total += tl.load(sum_ptr)
        tl.store(sum_ptr, total)
        tl.store(norm_ptr, tl.sqrt(total))
        tl.store(arrival_count_ptr, 0)


@triton.jit(launch_metadata=_launch_metadata, do_not_specialize=["blocks"])
def scale_kernel(
    block_to_tensor_ptr,
    tensor_table_ptr,
    grads_ptr,
    norm_ptr,
    max_norm_ptr,
    n_bytes,
    blocks,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Clip every gradient that owns a program, in place; where nothing is clipped, touch nothing.

    Preconditions: those of `norm_kernel` and of conditions.py.
    """
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = blocks * BLOCK_SIZE
    tensor, _, start, remaining = find_chunk(
        block_to_tensor_ptr, tensor_table_ptr, NORM_FIRST, chunk
    )
    grad_ptr = pointer(tl.load(grads_ptr + tensor), start, DTYPE, ALIGNED)
    coefficient = clip_coef(norm_ptr, max_norm_ptr, COMPUTE_DTYPE)
    remaining = tl.where(coefficient == 1, 0, remaining)

    offsets = tl.arange(0, BLOCK_SIZE)
    if remaining >= chunk:
        for block in tl.range(0, blocks):
            ptr = grad_ptr + block * BLOCK_SIZE + offsets
            tl.store(ptr, encode(decode(tl.load(ptr), COMPUTE_DTYPE) * coefficient, DTYPE))
    else:
        rest = remaining.to(tl.int32)
        for block in tl.range(0, tl.cdiv(rest, BLOCK_SIZE)):
            at = block * BLOCK_SIZE + offsets
            grad = decode(tl.load(grad_ptr + at, mask=at < rest), COMPUTE_DTYPE)
            tl.store(grad_ptr + at, encode(grad * coefficient, DTYPE), mask=at < rest)
