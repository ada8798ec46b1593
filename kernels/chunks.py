"""Where a program finds its tensor: the tables that every launch over many tensors reads."""

import triton
import triton.language as tl

# Columns of a row of the tensor table.
NUMEL = tl.constexpr(0)
GROUP = tl.constexpr(1)
FIRST = tl.constexpr(2)  # program of the update launch
NORM_FIRST = tl.constexpr(3)  # program of the launches over gradients alone
PARAM = tl.constexpr(4)  # and the states after it
MAX_STATES = tl.constexpr(3)
ROW_WIDTH = tl.constexpr(8)

# Columns of a row of the table of formats.
RANDOM = tl.constexpr(0)  # offset, columns, pitch and key; see random_bits.py
BESIDE = tl.constexpr(4)  # addresses: of the parameter's remainder, and of each state's exponents
FORMAT_WIDTH = tl.constexpr(8)


@triton.jit
def pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor of DTYPE that begins at an int64 address."""
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + start


@triton.jit
def find_chunk(block_to_tensor_ptr, tensor_table_ptr, FIRST: tl.constexpr, chunk):
    """What a program works on, a chunk of so many elements or the rest of a tensor.

    Returns:
        tensor: its index.
        row_ptr: to its row of the table.
        start: the chunk's first element.
        remaining: elements from there to the tensor's end.
    """
    program = tl.program_id(0)
    tensor = tl.load(block_to_tensor_ptr + program).to(tl.int64)
    row_ptr = tensor_table_ptr + tensor * ROW_WIDTH
    start = (program - tl.load(row_ptr + FIRST)) * chunk
    return tensor, row_ptr, start, tl.load(row_ptr + NUMEL) - start


@triton.jit
def scalars(ptr, N: tl.constexpr):
    """The N numbers at `ptr`."""
    values = ()
    for i in tl.static_range(N):
        values = values + (tl.load(ptr + i),)
    return values


@triton.jit
def in_dtype(values, DTYPE: tl.constexpr):
    """A tuple of scalars, each of this dtype."""
    converted = ()
    for i in tl.static_range(len(values)):
        converted = converted + (values[i].to(DTYPE),)
    return converted
