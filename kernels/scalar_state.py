"""How scalars of a tensor advance where the device counts.

Every function is `advance(step, values, hyper, DTYPE) -> (read, values)`:

- step: float64 block, how many updates each tensor has had before this one;
- values: tuple of float64 blocks, of the scalars before this update;
- hyper: tuple of float64 blocks, as the rule's;
- DTYPE: constexpr, in which the scalars are kept;
- read: tuple of float64 blocks, what the rule is given in place of the step.
"""

import triton
import triton.language as tl

from .numerics import one_minus_exp2

LOG2_096 = tl.constexpr(-0.05889368905356852)


@triton.jit
def nadam_scalars(step, values, hyper, DTYPE: tl.constexpr):
    """The product of all mu_t = b1 (1 - 0.96^(t psi) / 2), and three coefficients; see NAdam."""
    beta1, log2_beta2, momentum_decay = hyper[6:]
    mu = beta1 * (1 - 0.5 * tl.exp2((step + 1) * momentum_decay * LOG2_096))
    mu_next = beta1 * (1 - 0.5 * tl.exp2((step + 2) * momentum_decay * LOG2_096))
    product = (values[0].to(DTYPE) * mu.to(DTYPE)).to(tl.float64)
    of_grad, of_avg = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    correction2 = one_minus_exp2((step + 1) * log2_beta2, tl.float64)
    return (of_grad, of_avg, 1 / tl.sqrt(correction2)), (product,)


@triton.jit
def asgd_scalars(step, values, hyper, DTYPE: tl.constexpr):
    """eta_t = lr / (1 + lambd lr t)^alpha, mu_t = 1 / max(1, t - t0): of the next update."""
    lr, lambd, alpha, t0 = hyper[:4]
    mu = 1 / tl.maximum(step + 1 - t0, 1.0)
    eta = lr * tl.exp2(-alpha * tl.log2(1 + lambd * lr * (step + 1)))
    return values, (eta, mu)
