"""The update rules: one block in, one block out, pure arithmetic.

Every rule is `rule(param, grad, state, hyper, step, FLAGS) -> (param, state)`:

- param, grad: blocks in arithmetic precision, float64 for float64 parameters and float32 otherwise;
- state: tuple of such blocks, in the order in which the optimizer class names them;
- hyper: tuple of float64 scalars, in the order in which the optimizer class gives them. A rule
  casts each one once, after the scalar arithmetic;
- step: float64 scalar, how many updates this tensor has had before this one (None where neither
  LR_DECAY nor DAMPENING asks for it);
- FLAGS: constexpr, a sum of the bits below.
"""

import triton
import triton.language as tl

from .numerics import div, reciprocal, sqrt

MAXIMIZE = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
NESTEROV = tl.constexpr(4)
CENTERED = tl.constexpr(8)
LR_DECAY = tl.constexpr(16)
DAMPENING = tl.constexpr(32)


@triton.jit
def objective_gradient(param, grad, weight_decay, FLAGS: tl.constexpr):
    """The gradient of what is minimized: negated to maximize, plus that of the L2 penalty."""
    if MAXIMIZE & FLAGS:
        grad = grad * -1.0  # Triton's -x is 0 - x, which loses the sign of zero
    return tl.where(weight_decay == 0, grad, grad + weight_decay.to(grad.dtype) * param)


@triton.jit
def sgd_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Momentum as Sutskever et al. 2013 with torch's dampening: b = mu b + (1 - d) g, p -= lr b.

    A tensor's first update takes b = g: b starts from 0, and is not dampened there.
    Nesterov: p -= lr (g + mu b).
    """
    lr, momentum, one_minus_dampening, weight_decay = hyper
    update = objective_gradient(param, grad, weight_decay, FLAGS)
    if MOMENTUM & FLAGS:
        mu = momentum.to(grad.dtype)
        dampened = update
        if DAMPENING & FLAGS:
            dampened = tl.where(step == 0, update, one_minus_dampening.to(grad.dtype) * update)
        momentum_buffer = mu * state[0] + dampened
        update = update + mu * momentum_buffer if NESTEROV & FLAGS else momentum_buffer
        state = (momentum_buffer,)
    return param - lr.to(param.dtype) * update, state


@triton.jit
def adagrad_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Duchi et al. 2011: s += g^2, p -= lr_t g / (sqrt(s) + eps), lr_t = lr / (1 + t lr_decay)."""
    lr, lr_decay, eps, weight_decay = hyper
    if LR_DECAY & FLAGS:
        lr = lr * reciprocal(1 + step * lr_decay)
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    sum = state[0] + grad * grad
    param -= lr.to(param.dtype) * div(grad, sqrt(sum) + eps.to(param.dtype))
    return param, (sum,)


@triton.jit
def rmsprop_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Tieleman and Hinton 2012: v = a v + (1 - a) g^2, p -= lr g / (sqrt(v) + eps).

    Centered (Graves 2013): m = a m + (1 - a) g, and v - m^2 under the root.
    Momentum: b = mu b + g / (sqrt(v) + eps), p -= lr b.
    """
    lr, alpha, one_minus_alpha, eps, weight_decay, momentum = hyper
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    beta = one_minus_alpha.to(grad.dtype)
    square_avg = alpha.to(grad.dtype) * state[0] + beta * grad * grad
    new_state = (square_avg,)
    variance = square_avg
    if CENTERED & FLAGS:
        grad_avg = state[1] + beta * (grad - state[1])
        variance = square_avg - grad_avg * grad_avg
        new_state = new_state + (grad_avg,)
    update = div(grad, sqrt(variance) + eps.to(grad.dtype))
    if MOMENTUM & FLAGS:
        momentum_buffer = state[2 if CENTERED & FLAGS else 1]
        update = momentum.to(grad.dtype) * momentum_buffer + update
        new_state = new_state + (update,)
    return param - lr.to(param.dtype) * update, new_state
