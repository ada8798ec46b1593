"""Whether a step happens and what its gradients are multiplied with, read from the device.

Pointers that are None ask for nothing:

- found_inf_ptr: float32; anything but 0 skips the step;
- grad_scale_ptr: float32; what the gradients must be divided by;
- grad_norm_ptr: float64; the norm of the gradients, unscaled;
- max_norm_ptr: float64; None beside a norm that only skips.
"""

import triton
import triton.language as tl

from .numerics import div

CLIP_EPS = tl.constexpr(1e-6)  # torch.nn.utils.clip_grad_norm_'s


@triton.jit
def step_is_taken(found_inf_ptr, grad_norm_ptr, SKIP_NONFINITE: tl.constexpr):
    """Whether the step happens: an int1 scalar."""
    taken = tl.full((), 1, tl.int1)
    if found_inf_ptr is not None:
        taken = taken & (tl.load(found_inf_ptr) == 0)
    if SKIP_NONFINITE:
        taken = taken & (tl.abs(tl.load(grad_norm_ptr)) < float("inf"))
    return taken


@triton.jit
def inv_scale(grad_scale_ptr, DTYPE: tl.constexpr):
    """What undoes the scale."""
    return div(tl.full((), 1, DTYPE), tl.load(grad_scale_ptr).to(DTYPE))


@triton.jit
def clip_coef(grad_norm_ptr, max_norm_ptr, DTYPE: tl.constexpr):
    """min(max_norm / (norm + eps), 1); NaN where the norm is."""
    norm = tl.load(grad_norm_ptr).to(DTYPE)
    coefficient = div(tl.load(max_norm_ptr).to(DTYPE), norm + CLIP_EPS)
    return tl.where(coefficient > 1, 1, coefficient).to(DTYPE)
