"""Where rows of gradients lie: the tables of tensors, and the keys by which rows are sorted."""

import triton
import triton.language as tl

# Columns of a row of the tensor table; the addresses of up to MAX_STATES states follow.
GROUP = tl.constexpr(0)
WIDTH = tl.constexpr(1)  # elements of a row
ROWS = tl.constexpr(2)  # rows of the tensor
KEY = tl.constexpr(3)  # of row 0
PARAM = tl.constexpr(4)
STATES = tl.constexpr(5)
MAX_STATES = tl.constexpr(2)
ROW_STATE = tl.constexpr(7)
TENSOR_COLUMNS = tl.constexpr(8)

# Columns of a row of the gradient table.
COUNT = tl.constexpr(0)  # rows of the gradient
FIRST = tl.constexpr(1)  # program of the launch
POSITION = tl.constexpr(2)  # of its first key
IDS = tl.constexpr(3)
VALUES = tl.constexpr(4)
GRAD_COLUMNS = tl.constexpr(5)


@triton.jit
def keys_kernel(tensors_ptr, grads_ptr, keys_ptr, BLOCK_SIZE: tl.constexpr):
    """A key for every row of every gradient: the row's, or where there is no such row, the last.

    A tensor of n rows has n + 1 keys, which follow those of the tensor before it.

    Preconditions, beside those of `rows_kernel`: a grid of blocks and tensors; keys_ptr: int32 or
    int64, one a row of all gradients, in the order of positions.
    """
    tensor = tl.program_id(1).to(tl.int64)
    grad_ptr = grads_ptr + tensor * GRAD_COLUMNS
    tensor_ptr = tensors_ptr + tensor * TENSOR_COLUMNS
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < tl.load(grad_ptr + COUNT)
    ids_ptr = tl.load(grad_ptr + IDS).to(tl.pointer_type(tl.int64))
    ids = tl.load(ids_ptr + offsets, mask=mask, other=0)
    rows = tl.load(tensor_ptr + ROWS)
    keys = tl.load(tensor_ptr + KEY) + tl.where((ids >= 0) & (ids < rows), ids, rows)
    positions = tl.load(grad_ptr + POSITION) + offsets
    tl.store(keys_ptr + positions, keys.to(keys_ptr.dtype.element_ty), mask=mask)


@triton.jit
def find_tensor(grads_ptr, program, first, n_tensors):
    """The last of the launch's tensors that does not begin after this program."""
    low = first
    high = first + n_tensors - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(grads_ptr + middle * GRAD_COLUMNS + FIRST) <= program:
            low = middle
        else:
            high = middle - 1
    return low.to(tl.int64)


@triton.jit
def first_chunk(keys_ptr, key, chunk, latest):
    """The first chunk up to `latest` that does not end before `key`."""
    low = latest * 0
    high = latest
    while low < high:
        middle = (low + high) // 2
        if tl.load(keys_ptr + (middle + 1) * chunk - 1) < key:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def last_chunk(keys_ptr, key, chunk, earliest, count):
    """The last chunk from `earliest` on that does not begin after `key`."""
    low = earliest
    high = (count - 1) // chunk
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(keys_ptr + middle * chunk) > key:
            high = middle - 1
        else:
            low = middle
    return low


@triton.jit
def row_of(key_ptr, base, mask, other):
    """The row of a key: int32, or `other` where there is no key."""
    row = (tl.load(key_ptr, mask=mask, other=0).to(tl.int64) - base).to(tl.int32)
    return tl.where(mask, row, other)
