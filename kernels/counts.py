"""Counts updates in the tensors that hold the counts, wherever each of them is."""

import triton
import triton.language as tl

from .chunks import GROUP, ROW_WIDTH, in_dtype, scalars
from .conditions import step_is_taken


@triton.jit(do_not_specialize=["n_tensors"])
def count_kernel(
    steps_ptr,
    grads_ptr,
    column_ptr,
    tensor_table_ptr,
    hyperparameters_ptr,
    found_inf_ptr,
    grad_norm_ptr,
    n_tensors,
    ADVANCE: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALAR_DTYPE: tl.constexpr,
    GRAD_COLUMNS: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Add 1 to the step of each tensor that has a gradient, if the step is taken.

    With ADVANCE its other scalars are advanced, too.

    Preconditions, none of which the kernel can check:

    - steps_ptr: int64 [1 + N_SCALARS, n_tensors], addresses of one number each, no two the same:
      steps of DTYPE, then scalars of SCALAR_DTYPE;
    - grads_ptr: int64 [n_tensors, GRAD_COLUMNS]; the last is 0 where there is no gradient;
    - column_ptr: float64 [n_tensors], given the steps of before, or None; with ADVANCE
      [n_tensors, one more than it returns], given what it returns before them;
    - tensor_table_ptr, hyperparameters_ptr: see multi_tensor.py; None without ADVANCE;
    - found_inf_ptr, grad_norm_ptr: see conditions.py.
    """
    tensor = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensor < n_tensors
    step_ptr = tl.load(steps_ptr + tensor, mask=mask, other=0).to(tl.pointer_type(DTYPE))
    grad = tl.load(grads_ptr + tensor * GRAD_COLUMNS + GRAD_COLUMNS - 1, mask=mask, other=0)
    step = tl.load(step_ptr, mask=mask, other=0.0)
    if ADVANCE is None:
        if column_ptr is not None:
            tl.store(column_ptr + tensor, step.to(tl.float64), mask=mask)
    counted = mask & (grad != 0) & step_is_taken(found_inf_ptr, grad_norm_ptr, SKIP_NONFINITE)
    tl.store(step_ptr, step + 1, mask=counted)
    if ADVANCE is not None:
        group = tl.load(tensor_table_ptr + tensor * ROW_WIDTH + GROUP, mask=mask, other=0)
        first = scalars(hyperparameters_ptr, N_HYPERS)  # so that no lane divides by zero
        hyper, ptrs, values = (), (), ()
        for i in tl.static_range(N_HYPERS):
            hyper_ptr = hyperparameters_ptr + group * N_HYPERS + i
            hyper = hyper + (tl.load(hyper_ptr, mask=mask, other=first[i]),)
        for i in tl.static_range(N_SCALARS):
            address = tl.load(steps_ptr + (1 + i) * n_tensors + tensor, mask=mask, other=0)
            ptrs = ptrs + (address.to(tl.pointer_type(SCALAR_DTYPE)),)
            values = values + (tl.load(ptrs[i], mask=mask, other=0.0),)
        read, new = ADVANCE(step.to(tl.float64), in_dtype(values, tl.float64), hyper, SCALAR_DTYPE)
        column_ptr = column_ptr + tensor * (len(read) + 1)
        for i in tl.static_range(len(read)):
            tl.store(column_ptr + i, read[i], mask=mask)
        tl.store(column_ptr + len(read), step.to(tl.float64), mask=mask)
        for i in tl.static_range(N_SCALARS):
            tl.store(ptrs[i], new[i].to(SCALAR_DTYPE), mask=counted)
