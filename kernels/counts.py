"""Counts updates in the tensors that hold the counts, wherever each of them is."""

import triton
import triton.language as tl

from .conditions import step_is_taken


@triton.jit(do_not_specialize=["n_tensors"])
def count_kernel(
    steps_ptr,
    grads_ptr,
    column_ptr,
    found_inf_ptr,
    grad_norm_ptr,
    n_tensors,
    DTYPE: tl.constexpr,
    GRAD_COLUMNS: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Add 1 to the step of each tensor that has a gradient, if the step is taken.

    Preconditions, none of which the kernel can check:

    - steps_ptr: int64 [n_tensors], addresses of one number of DTYPE each, no two the same;
    - grads_ptr: int64 [n_tensors, GRAD_COLUMNS]; the last is 0 where there is no gradient;
    - column_ptr: float64 [n_tensors], given the steps of before, or None;
    - found_inf_ptr, grad_norm_ptr: see conditions.py.
    """
    tensor = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensor < n_tensors
    step_ptr = tl.load(steps_ptr + tensor, mask=mask, other=0).to(tl.pointer_type(DTYPE))
    grad = tl.load(grads_ptr + tensor * GRAD_COLUMNS + GRAD_COLUMNS - 1, mask=mask, other=0)
    step = tl.load(step_ptr, mask=mask, other=0.0)
    if column_ptr is not None:
        tl.store(column_ptr + tensor, step.to(tl.float64), mask=mask)
    counted = mask & (grad != 0) & step_is_taken(found_inf_ptr, grad_norm_ptr, SKIP_NONFINITE)
    tl.store(step_ptr, step + 1, mask=counted)
