"""Updates by rows: of those that a sparse gradient has, or of all where state is kept by row."""

import triton
import triton.language as tl

from .chunks import in_dtype, pointer, scalars
from .conditions import inv_scale, step_is_taken
from .keys import (
    COUNT,
    FIRST,
    GRAD_COLUMNS,
    GROUP,
    KEY,
    PARAM,
    POSITION,
    ROW_STATE,
    ROWS,
    STATES,
    TENSOR_COLUMNS,
    VALUES,
    WIDTH,
    find_tensor,
    first_chunk,
    last_chunk,
    row_of,
)
from .numerics import decode, encode
from .rules import CATCH_UP


@triton.jit
def _segmented_scan(grad, key):
    """Every row of `grad` becomes the sum of the rows up to it that have its key.

    Keys ascend. The order of additions depends on the places of the rows alone: Hillis and Steele,
    "Data parallel algorithms", 1986, for as many rounds as the most frequent key asks for.
    """
    row = tl.arange(0, key.shape[0])
    shift = 1
    same = (row >= 1) & (tl.gather(key, tl.maximum(row - 1, 0), 0) == key)
    while tl.max(same.to(tl.int32), 0) > 0:
        earlier = tl.maximum(row - shift, 0)
        sums = tl.gather(grad, tl.broadcast_to(earlier[:, None], grad.shape), 0)
        grad = tl.where(same[:, None], grad + sums, grad)
        shift *= 2
        earlier = tl.maximum(row - shift, 0)
        same = (row >= shift) & (tl.gather(key, earlier, 0) == key)
    return grad


@triton.jit
def _tensor_pointers(
    tensor_ptr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROW_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """To the parameter, its states, and the state of rows."""
    param_ptr = pointer(tl.load(tensor_ptr + PARAM), 0, PARAM_DTYPE, ALIGNED)
    state_ptrs = ()
    for i in tl.static_range(N_STATES):
        address = tl.load(tensor_ptr + STATES + i)
        state_ptrs = state_ptrs + (pointer(address, 0, STATE_DTYPE, ALIGNED),)
    row_ptrs = ()
    if ROW_DTYPE is not None:
        row_ptrs = (pointer(tl.load(tensor_ptr + ROW_STATE), 0, ROW_DTYPE, False),)
    return param_ptr, state_ptrs, row_ptrs


@triton.jit
def _row_pointers(tensor_pointers, row, width, COLUMNS: tl.constexpr):
    """To the elements of rows of these tensors."""
    param_ptr, state_ptrs, row_ptrs = tensor_pointers
    offsets = row.to(tl.int64)[:, None] * width + tl.arange(0, COLUMNS)[None, :]
    states = ()
    for i in tl.static_range(len(state_ptrs)):
        states = states + (state_ptrs[i] + offsets,)
    of_rows = ()
    for i in tl.static_range(len(row_ptrs)):
        of_rows = of_rows + (row_ptrs[i] + row[:, None],)
    return param_ptr + offsets, states, of_rows


@triton.jit
def _load_rows(pointers, active, mask, COMPUTE_DTYPE: tl.constexpr):
    param_ptr, state_ptrs, row_ptrs = pointers
    param = decode(tl.load(param_ptr, mask=mask, other=0.0), COMPUTE_DTYPE)
    state = ()
    for i in tl.static_range(len(state_ptrs)):
        state = state + (decode(tl.load(state_ptrs[i], mask=mask, other=0.0), COMPUTE_DTYPE),)
    row_state = ()
    for i in tl.static_range(len(row_ptrs)):
        # Elsewhere the largest step there is: then there are none to make good.
        state_of_rows = tl.load(row_ptrs[i], mask=active[:, None], other=2147483647)
        row_state = row_state + (state_of_rows,)
    return param, state, row_state


@triton.jit
def _update_rows(
    pointers,
    active,
    mask,
    values,
    grad,
    width,
    hyper,
    step,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    param_ptr, state_ptrs, row_ptrs = pointers
    param, state, row_state = values
    if len(row_ptrs) == 0:
        param, state = RULE(param, grad, state, hyper, step, FLAGS)
    else:
        row_ptr = row_ptrs[0]
        param, state, new = RULE(param, grad, state, row_state[0], width, hyper, step, FLAGS)
        tl.store(row_ptr, new.to(row_ptr.dtype.element_ty), mask=active[:, None])
    if not (CATCH_UP & FLAGS):
        tl.store(param_ptr, encode(param, param_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(len(state_ptrs)):
        ptr = state_ptrs[i]
        tl.store(ptr, encode(state[i], ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_tensor", "n_tensors", "chunk"])
def rows_kernel(
    tensors_ptr,
    grads_ptr,
    hyperparameters_ptr,
    steps_ptr,
    keys_ptr,
    permutation_ptr,
    partials_ptr,
    arrival_counts_ptr,
    found_inf_ptr,
    grad_scale_ptr,
    step_status_ptr,
    first_tensor,
    n_tensors,
    chunk,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    DOUBLES: tl.constexpr,
    N_HYPERS: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROW_DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update the rows of several tensors, in place, each that has a gradient once.

    A program sums the gradients of `chunk` positions in the order of their keys, BLOCK_ROWS at a
    time, and updates the rows whose positions are all its own. Of a row that has more, every
    program stores a partial sum; whichever is the last to finish adds them, always in the order of
    positions, and updates the row.

    Preconditions, none of which the kernel can check:

    - tensors_ptr, grads_ptr: int64 [tensors, TENSOR_COLUMNS], [tensors, GRAD_COLUMNS]. The launch
      is about n_tensors of them from first_tensor on, whose programs follow one another, as many as
      each has chunks;
    - hyperparameters_ptr, steps_ptr, step_status_ptr: as for `multi_tensor_kernel`; found_inf_ptr,
      grad_scale_ptr: see conditions.py;
    - keys_ptr: `keys_kernel`'s, sorted, or None: then gradients are dense, and position is row;
    - permutation_ptr: int64, the position of each key before;
    - partials_ptr: [programs, 2, COLUMNS] of the arithmetic's dtype. A tensor's rows there are as
      wide as its own: what is loaded one by one stays so, or a warp would touch sectors again;
    - arrival_counts_ptr: int32, 0, one a program;
    - addresses are those of rows that follow one another without gaps; COLUMNS is no less than
      their width, and a power of two;
    - MULTIPLE divides the width; if it is not 1, all addresses but row state's and ids' are
      multiples of 16 bytes, and so are MULTIPLE elements of any of the dtypes.
    """
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if PARAM_DTYPE == tl.float64 else tl.float32
    ALIGNED: tl.constexpr = MULTIPLE > 1
    program = tl.program_id(0)
    tensor = find_tensor(grads_ptr, program, first_tensor, n_tensors)
    tensor_ptr = tensors_ptr + tensor * TENSOR_COLUMNS
    grad_ptr = grads_ptr + tensor * GRAD_COLUMNS
    count = tl.load(grad_ptr + COUNT).to(tl.int32)
    first_program = tl.load(grad_ptr + FIRST).to(tl.int32)
    width = tl.multiple_of(tl.load(tensor_ptr + WIDTH), MULTIPLE)
    values_ptr = pointer(tl.load(grad_ptr + VALUES), 0, GRAD_DTYPE, ALIGNED)
    tensor_pointers = _tensor_pointers(
        tensor_ptr, N_STATES, PARAM_DTYPE, STATE_DTYPE, ROW_DTYPE, ALIGNED
    )
    hyper = scalars(hyperparameters_ptr + tl.load(tensor_ptr + GROUP) * N_HYPERS, N_HYPERS)
    step = None
    if steps_ptr is not None:
        step = tl.load(steps_ptr + tensor).to(tl.float64)
    if not DOUBLES:
        hyper = in_dtype(hyper, COMPUTE_DTYPE)
        if step is not None:
            step = step.to(COMPUTE_DTYPE)

    start = (program - first_program) * chunk
    stop = tl.minimum(start + chunk, count)
    if step_status_ptr is not None:
        taken = step_is_taken(found_inf_ptr, None, False)
        stop = tl.where(taken, stop, start)
    unscale = None
    if grad_scale_ptr is not None:
        unscale = inv_scale(grad_scale_ptr, COMPUTE_DTYPE)

    block_row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, COLUMNS)
    within = (column < width)[None, :]
    before = -1
    carried = -1
    carry = tl.zeros((COLUMNS,), COMPUTE_DTYPE)
    if keys_ptr is not None:
        position = tl.load(grad_ptr + POSITION)
        keys_ptr += position
        permutation_ptr += position
        partials_ptr += first_program.to(tl.int64) * (2 * COLUMNS)
        base = tl.load(tensor_ptr + KEY)
        n_rows = tl.load(tensor_ptr + ROWS).to(tl.int32)
        before = row_of(keys_ptr + start - 1, base, start > 0, -1)

    for block in tl.range(start, stop, BLOCK_ROWS):
        place = block + block_row
        inside = place < stop
        row = place
        source = place.to(tl.int64)
        complete = inside
        if keys_ptr is not None:
            row = row_of(keys_ptr + place, base, inside, -1)
            after = row_of(keys_ptr + place + 1, base, place + 1 < count, -1)
            source = tl.load(permutation_ptr + place, mask=inside, other=0) - position
            ends = inside & (row != after)
            complete = ends & (row != before) & (row != n_rows)
        grad_offsets = source[:, None] * width + column[None, :]
        mask = inside[:, None] & within
        grad = tl.load(values_ptr + grad_offsets, mask=mask, other=0.0)
        pointers = _row_pointers(tensor_pointers, row, width, COLUMNS)
        updated = complete[:, None] & within
        values = _load_rows(pointers, complete, updated, COMPUTE_DTYPE)
        grad = decode(grad, COMPUTE_DTYPE)
        if unscale is not None:
            grad = grad * unscale
            tl.store(values_ptr + grad_offsets, encode(grad, GRAD_DTYPE), mask=mask)
        if keys_ptr is not None:
            if BLOCK_ROWS > 1:
                grad = _segmented_scan(grad, tl.where(inside, row, -2 - block_row))
            grad = tl.where((row == carried)[:, None], grad + carry[None, :], grad)
            last = tl.minimum(block + BLOCK_ROWS, stop) - 1
            carried = row_of(keys_ptr + last, base, last < stop, -1)
            if carried == row_of(keys_ptr + last + 1, base, last + 1 < stop, -1):
                carry = tl.sum(tl.where((place == last)[:, None], grad, 0.0), 0)
            # Of a row with positions in other chunks: the sum of those in this one.
            partial = (ends & (row == before)) | ((place == stop - 1) & (row == after))
            slot = 2 * (program - first_program) + (row != before).to(tl.int32)
            slot_ptr = partials_ptr + slot.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(slot_ptr, grad, mask=partial[:, None] & within)
        _update_rows(pointers, complete, updated, values, grad, width, hyper, step, RULE, FLAGS)

    if keys_ptr is not None:
        index = program - first_program
        tl.debug_barrier()  # all of this program's partial sums are stored
        for side in tl.range(0, 2):
            # The row that began in an earlier chunk, then the one that goes on in a later chunk.
            place = start if side == 0 else stop - 1
            other = start - 1 if side == 0 else stop
            exists = (stop > start) & (other >= 0) & (other < count)
            row = row_of(keys_ptr + place, base, exists, -1)
            crosses = row == row_of(keys_ptr + other, base, exists, -2)
            done = before * 0 - 1 if side == 0 else before
            if crosses & (row != n_rows) & (row != done):
                begin = first_chunk(keys_ptr, base + row, chunk, index)
                end = last_chunk(keys_ptr, base + row, chunk, index, count)
                arrival_count_ptr = arrival_counts_ptr + first_program + begin
                # Acquire and release: the last one sees all that was stored before.
                n_done = tl.atomic_add(arrival_count_ptr, 1, sem="acq_rel", scope="gpu")
                if n_done == end - begin:
                    sums = tl.zeros((BLOCK_ROWS, COLUMNS), COMPUTE_DTYPE)
                    for earliest in tl.range(begin, end + 1, BLOCK_ROWS):
                        part = earliest + block_row
                        slot = 2 * part + (part == begin).to(tl.int32)
                        slot_ptr = partials_ptr + slot.to(tl.int64)[:, None] * width
                        mask = (part <= end)[:, None] & within
                        sums += tl.load(
                            slot_ptr + column[None, :], mask=mask, other=0.0, cache_modifier=".cg"
                        )
                    grad = tl.broadcast_to(tl.sum(sums, 0)[None, :], (BLOCK_ROWS, COLUMNS))
                    pointers = _row_pointers(tensor_pointers, row + block_row * 0, width, COLUMNS)
                    one = block_row == 0
                    updated = one[:, None] & within
                    values = _load_rows(pointers, one, updated, COMPUTE_DTYPE)
                    _update_rows(
                        pointers, one, updated, values, grad, width, hyper, step, RULE, FLAGS
                    )

    # Last: after a store, AMD's compiler takes addresses that are loaded for a thread's own.
    if step_status_ptr is not None:
        if program == 0:
            tl.store(step_status_ptr, taken.to(tl.float32))
            tl.store(step_status_ptr + 1, 1 - taken.to(tl.float32))
