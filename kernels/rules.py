"""The update rules: one block in, one block out, pure arithmetic.

Every rule is `rule(param, grad, state, hyper, step, FLAGS) -> (param, state)`:

- param, grad: blocks in arithmetic precision, float64 for float64 parameters and float32 otherwise;
- state: tuple of such blocks, in the order in which the optimizer class names them;
- hyper: tuple of float64 scalars, in the order in which the optimizer class gives them. A rule
  casts each one once, after the scalar arithmetic;
- step: float64 scalar, how many updates this tensor has had before this one (None where the
  optimizer class does not ask for it), or a tuple of scalars from scalar_state.py;
- FLAGS: constexpr, a sum of the bits below.

Where two products are added, `tl.fma` says which is rounded first: a compiler would choose for each
branch, and bits would depend on where an element lies.

Rules that know of rows are given two more, after state, and return the first of them:

- row_state: the state that has one number a row, a column of the block;
- width: how many elements of a row are the tensor's; the block has zeros after them.
"""

import triton
import triton.language as tl

from .flags import flag
from .numerics import LN_2, div, lerp, one_minus_exp2, power, reciprocal, sign, sqrt

MAXIMIZE = flag("MAXIMIZE")
MOMENTUM = flag("MOMENTUM")
NESTEROV = flag("NESTEROV")
CENTERED = flag("CENTERED")
LR_DECAY = flag("LR_DECAY")
DAMPENING = flag("DAMPENING")
DECOUPLED = flag("DECOUPLED")
AMSGRAD = flag("AMSGRAD")
CATCH_UP = flag("CATCH_UP")  # parameters are not stored


@triton.jit
def objective_gradient(param, grad, weight_decay, FLAGS: tl.constexpr):
    """The gradient of what is minimized: negated to maximize, plus that of the L2 penalty."""
    if MAXIMIZE & FLAGS:
        grad = grad * -1.0  # Triton's -x is 0 - x, which loses the sign of zero
    if DECOUPLED & FLAGS:
        return grad
    else:
        return tl.where(weight_decay == 0, grad, tl.fma(weight_decay.to(grad.dtype), param, grad))


@triton.jit
def descend(param, update, lr, weight_decay, FLAGS: tl.constexpr):
    """p - update, or with decoupled weight decay p - (lr weight_decay p + update).

    Not p (1 - lr weight_decay): in float32 that factor is off by the same in every step.
    """
    if DECOUPLED & FLAGS:
        rate = (lr * weight_decay).to(param.dtype)
        update = tl.where(rate == 0, update, tl.fma(rate, param, update))
    return param - update


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
    if DECOUPLED & FLAGS:
        return descend(param, lr.to(param.dtype) * update, lr, weight_decay, FLAGS), state
    else:
        # On sm_100 the compiler fuses this for some storage formats only, and bits would differ.
        return tl.fma(-lr.to(param.dtype), update, param), state


@triton.jit
def adagrad_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Duchi et al. 2011: s += g^2, p -= lr_t g / (sqrt(s) + eps), lr_t = lr / (1 + t lr_decay)."""
    lr, lr_decay, eps, weight_decay = hyper
    if LR_DECAY & FLAGS:
        lr = lr * reciprocal(1 + step * lr_decay)
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    sum = state[0] + grad * grad
    update = lr.to(param.dtype) * div(grad, sqrt(sum, FLAGS) + eps.to(param.dtype), FLAGS)
    return descend(param, update, lr, weight_decay, FLAGS), (sum,)


@triton.jit
def rmsprop_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Tieleman and Hinton 2012: v = a v + (1 - a) g^2, p -= lr g / (sqrt(v) + eps).

    Centered (Graves 2013): m = a m + (1 - a) g, and v - m^2 under the root.
    Momentum: b = mu b + g / (sqrt(v) + eps), p -= lr b.
    """
    lr, alpha, one_minus_alpha, eps, weight_decay, momentum = hyper
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    beta = one_minus_alpha.to(grad.dtype)
    square_avg = tl.fma(alpha.to(grad.dtype), state[0], beta * grad * grad)
    new_state = (square_avg,)
    variance = square_avg
    if CENTERED & FLAGS:
        grad_avg = state[2 if MOMENTUM & FLAGS else 1]
        grad_avg += beta * (grad - grad_avg)
        variance = square_avg - grad_avg * grad_avg
        # Never negative but for rounding, as that of an average which was stored as 0.
        variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    update = div(grad, sqrt(variance, FLAGS) + eps.to(grad.dtype), FLAGS)
    if MOMENTUM & FLAGS:
        update = momentum.to(grad.dtype) * state[1] + update
        new_state = new_state + (update,)
    if CENTERED & FLAGS:
        new_state = new_state + (grad_avg,)
    return descend(param, lr.to(param.dtype) * update, lr, weight_decay, FLAGS), new_state


@triton.jit
def adam_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Kingma and Ba 2015: m += (1 - b1) (g - m), v = b2 v + (1 - b2) g^2, and with
    m^ = m / (1 - b1^t), v^ = v / (1 - b2^t): p -= lr m^ / (sqrt(v^) + eps).

    AMSGrad (Reddi et al. 2018): the largest v until now in place of v.
    """
    lr, one_minus_beta1, log2_beta1, beta2, one_minus_beta2, log2_beta2, eps, weight_decay = hyper
    DTYPE: tl.constexpr = param.dtype
    correction1 = one_minus_exp2((step + 1) * log2_beta1, DTYPE)
    correction2 = one_minus_exp2((step + 1) * log2_beta2, DTYPE)
    step_size, scale = div(lr.to(DTYPE), correction1), div(sqrt(correction2), correction2)
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    exp_avg = lerp(state[0], grad, one_minus_beta1)
    exp_avg_sq = tl.fma(beta2.to(DTYPE), state[1], one_minus_beta2.to(DTYPE) * grad * grad)
    new_state = (exp_avg, exp_avg_sq)
    largest = exp_avg_sq
    if AMSGRAD & FLAGS:
        largest = tl.maximum(state[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        new_state = new_state + (largest,)
    denominator = sqrt(largest, FLAGS) * scale + eps.to(DTYPE)
    update = step_size * div(exp_avg, denominator, FLAGS)
    return descend(param, update, lr, weight_decay, FLAGS), new_state


@triton.jit
def radam_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Liu et al. 2020: Adam's averages, and while the variance is not tractable p -= lr m^;
    from then on, by the tensor's own step, p -= lr r m^ sqrt(1 - b2^t) / (sqrt(v) + eps).
    """
    lr, one_minus_beta1, log2_beta1, beta2, one_minus_beta2, log2_beta2, rest = hyper[:7]
    eps, weight_decay = hyper[7:]
    DTYPE: tl.constexpr = param.dtype
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    exp_avg = lerp(state[0], grad, one_minus_beta1)
    exp_avg_sq = tl.fma(beta2.to(DTYPE), state[1], one_minus_beta2.to(DTYPE) * grad * grad)
    step_size = div(lr.to(DTYPE), one_minus_exp2((step + 1) * log2_beta1, DTYPE))
    correction2 = one_minus_exp2((step + 1) * log2_beta2, DTYPE)
    length, longest = averaged_length(step + 1, one_minus_beta2, log2_beta2, rest, correction2)
    tractable = length > 5
    length, longest = tl.where(tractable, length, 6.0), tl.where(tractable, longest, 6.0)
    ratio = div((length - 4) * (length - 2) * longest, (longest - 4) * (longest - 2) * length)
    step_size *= tl.where(tractable, sqrt(ratio * correction2), 1.0)
    denominator = tl.where(tractable, sqrt(exp_avg_sq, FLAGS) + eps.to(DTYPE), 1.0)
    update = step_size * div(exp_avg, denominator, FLAGS)
    return descend(param, update, lr, weight_decay, FLAGS), (exp_avg, exp_avg_sq)


@triton.jit
def averaged_length(step, one_minus_beta, log2_beta, rest, correction):
    """rho_t = rho - 2 t b^t / (1 - b^t) and rho = 2 / (1 - b) - 1, of RAdam.

    Of an average over few steps beside 1 / (1 - b), rho_t is a small difference of large numbers:
    there x / (e^x - 1) is expanded. rest: rho + 2 / log(b); correction: 1 - b^t.
    """
    DTYPE: tl.constexpr = correction.dtype
    NEAR: tl.constexpr = 0.125 if DTYPE == tl.float64 else 1.0
    t, x = step.to(DTYPE), (step * log2_beta * -LN_2).to(DTYPE)
    longest = div(2 * (correction * 0 + 1), one_minus_beta.to(DTYPE)) - 1
    y = x * x
    series = 1 - x * (1 / 6 - y * (1 / 360 - y * (1 / 15120 - y * (1 / 604800))))
    length = longest - 2 * t * div(1 - correction, correction)
    return tl.where(x < NEAR, rest.to(DTYPE) + t * series, length), longest


@triton.jit
def nadam_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Dozat 2016: Adam's averages, p -= lr (c_g g + c_m m) / (sqrt(v^) + eps)."""
    lr, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay = hyper[:6]
    of_grad, of_avg, scale = step
    DTYPE: tl.constexpr = param.dtype
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    exp_avg = lerp(state[0], grad, one_minus_beta1)
    update = tl.fma((lr * of_grad).to(DTYPE), grad, (lr * of_avg).to(DTYPE) * exp_avg)
    exp_avg_sq = tl.fma(beta2.to(DTYPE), state[1], one_minus_beta2.to(DTYPE) * grad * grad)
    denominator = sqrt(exp_avg_sq, FLAGS) * scale.to(DTYPE) + eps.to(DTYPE)
    update = div(update, denominator, FLAGS)
    return descend(param, update, lr, weight_decay, FLAGS), (exp_avg, exp_avg_sq)


@triton.jit
def asgd_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Polyak and Juditsky 1992: p -= eta (lambd p + g), and the average a += mu (p - a)."""
    lambd, weight_decay = hyper[1], hyper[4]
    eta, mu = step
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    decay = tl.where(tl.abs(param) == float("inf"), 0.0, (eta * lambd).to(param.dtype) * param)
    param = param - tl.fma(eta.to(param.dtype), grad, decay)
    average = state[0] + mu.to(param.dtype) * (param - state[0])
    return param, (tl.where(mu == 1, param, average),)


@triton.jit
def adamax_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Kingma and Ba 2015, section 7.1: m += (1 - b1) (g - m), u = max(b2 u, |g| + eps),
    p -= lr / (1 - b1^t) m / u.
    """
    lr, one_minus_beta1, log2_beta1, beta2, eps, weight_decay = hyper
    DTYPE: tl.constexpr = param.dtype
    step_size = div(lr.to(DTYPE), one_minus_exp2((step + 1) * log2_beta1, DTYPE))
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    exp_avg = lerp(state[0], grad, one_minus_beta1)
    decayed, norm = beta2.to(DTYPE) * state[1], tl.abs(grad) + eps.to(DTYPE)
    exp_inf = tl.maximum(decayed, norm, propagate_nan=tl.PropagateNan.ALL)
    return param - step_size * div(exp_avg, exp_inf, FLAGS), (exp_avg, exp_inf)


@triton.jit
def adadelta_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Zeiler 2012: v = rho v + (1 - rho) g^2, d = sqrt(u + eps) / sqrt(v + eps) g,
    u = rho u + (1 - rho) d^2, p -= lr d.
    """
    lr, rho, one_minus_rho, eps, weight_decay = hyper
    DTYPE: tl.constexpr = param.dtype
    rho, one_minus_rho, eps = rho.to(DTYPE), one_minus_rho.to(DTYPE), eps.to(DTYPE)
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    square_avg = tl.fma(rho, state[0], one_minus_rho * grad * grad)
    delta = div(sqrt(state[1] + eps, FLAGS), sqrt(square_avg + eps, FLAGS), FLAGS) * grad
    acc_delta = tl.fma(rho, state[1], one_minus_rho * delta * delta)
    return param - lr.to(DTYPE) * delta, (square_avg, acc_delta)


@triton.jit
def rprop_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Riedmiller and Braun 1993, as torch: where g kept its sign, step_size grows; where it
    changed, step_size shrinks, and g becomes 0. p -= sign(g) step_size.
    """
    eta_minus, eta_plus, smallest, largest = hyper
    DTYPE: tl.constexpr = param.dtype
    if MAXIMIZE & FLAGS:
        grad = grad * -1.0
    turned = sign(grad) * sign(state[0])  # signs, for a product of gradients may underflow
    factor = tl.where(turned > 0, eta_plus.to(DTYPE), 1.0)
    factor = tl.where(turned < 0, eta_minus.to(DTYPE), factor)
    step_size = tl.maximum(state[1] * factor, smallest.to(DTYPE), tl.PropagateNan.ALL)
    step_size = tl.minimum(step_size, largest.to(DTYPE), tl.PropagateNan.ALL)
    grad = tl.where(turned < 0, 0.0, grad)
    return param - sign(grad) * step_size, (grad, step_size)


@triton.jit
def lion_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):
    """Chen et al. 2023: p -= lr (sign(m + (1 - b1) (g - m)) + wd p), m += (1 - b2) (g - m)."""
    lr, one_minus_beta1, one_minus_beta2, weight_decay = hyper
    if MAXIMIZE & FLAGS:
        grad = grad * -1.0
    update = lr.to(param.dtype) * sign(lerp(state[0], grad, one_minus_beta1))
    exp_avg = lerp(state[0], grad, one_minus_beta2)
    return descend(param, update, lr, weight_decay, DECOUPLED), (exp_avg,)


@triton.jit
def rowwise_adagrad_rule(param, grad, state, row_state, width, hyper, step, FLAGS: tl.constexpr):
    """Adagrad with one s a row: s += mean(g^2), p -= lr g / (sqrt(s) + eps), as FBGEMM has it.

    Decoupled decay: p -= lr weight_decay p first.
    """
    lr, weight_decay, eps = hyper
    decayed = param
    if DECOUPLED & FLAGS:
        decayed = param * (1 - lr * weight_decay).to(param.dtype)
    grad = objective_gradient(param, grad, weight_decay, FLAGS)
    squares = tl.fma(grad, grad, tl.zeros_like(grad))  # rounded alike in all lanes of a row
    sum = row_state + div(tl.sum(squares, 1, keep_dims=True), width.to(grad.dtype))
    scale = div(lr.to(grad.dtype), sqrt(sum) + eps.to(grad.dtype))
    return decayed - scale * grad, state, sum


@triton.jit
def lazy_rmsprop_rule(param, grad, state, row_state, width, hyper, step, FLAGS: tl.constexpr):
    """rmsprop_rule without momentum and decay, after what zeros did since update `row_state`.

    A zero gradient moves no parameter, and v = a v, m = a m. With CATCH_UP nothing else is done.
    """
    factor = power(hyper[1], tl.maximum(step - row_state, 0).to(tl.int32)).to(grad.dtype)
    averages = ()
    for i in tl.static_range(len(state)):
        # an infinite average stays so, however small the factor
        kept = tl.where(tl.abs(state[i]) == float("inf"), state[i], state[i] * factor)
        averages = averages + (kept,)
    if CATCH_UP & FLAGS:
        updates = step
    else:
        param, averages = rmsprop_rule(param, grad, averages, hyper, step, FLAGS)
        updates = step + 1
    return param, averages, row_state * 0 + updates
