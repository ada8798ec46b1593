"""The kernel of mixed_copy.py."""

import triton
import triton.language as tl


@triton.jit
def mixed_copy_kernel(
    param_ptr, grad_ptr, states_ptr, numel, N_STATES: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Load a parameter, its gradient and its states; add the gradient to all others, and store.

    Preconditions:

    - param_ptr, grad_ptr: [numel]; states_ptr: [N_STATES, numel], or None;
    - numel is a multiple of BLOCK_SIZE, and there is one program a block.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    param = tl.load(param_ptr + offsets).to(tl.float32)
    grad = tl.load(grad_ptr + offsets).to(tl.float32)
    states = ()
    for i in tl.static_range(N_STATES):
        states = states + (tl.load(states_ptr + i * numel + offsets).to(tl.float32),)
    tl.store(param_ptr + offsets, (param + grad).to(param_ptr.dtype.element_ty))
    for i in tl.static_range(N_STATES):
        state = (states[i] + grad).to(states_ptr.dtype.element_ty)
        tl.store(states_ptr + i * numel + offsets, state)
