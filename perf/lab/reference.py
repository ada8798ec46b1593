"""The check of a step: beside plain torch in float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lab.implementations import Step
from lab.rules import ROWWISE, Rule

CHECKED_STEPS = 3


class RowwiseReference:
    """Row-wise Adagrad in plain torch: s += mean(g^2), p -= lr g / (sqrt(s) + eps), s one a row."""

    def __init__(self, params: list[Parameter], lr: float, eps: float = 1e-10) -> None:
        self._params, self._lr, self._eps = params, lr, eps
        self.sums = [param.new_zeros(len(param)) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        for param, sum in zip(self._params, self.sums, strict=True):
            assert param.grad is not None
            sum += param.grad.square().mean(1)
            param.sub_(self._lr * param.grad / (sum.sqrt() + self._eps)[:, None])


def reference(rule: Rule, params: list[Parameter]) -> Any:
    """An optimizer over dense float64 gradients.

    A zero gradient moves no parameter under any of these rules, and RMSprop's state in the end is
    what zeros made of it: torch's dense optimizers are right for all of them.
    """
    if rule is ROWWISE:
        return RowwiseReference(params, **rule.kwargs)
    return getattr(torch.optim, rule.optimizer)(params, **rule.kwargs, foreach=False)


def check(
    step: Step,
    synchronize: Step,
    rule: Rule,
    probe: Callable[[], list[Tensor]],
    new_gradients: Callable[[int], list[Tensor]],
) -> tuple[float, float]:
    """Take steps with new gradients, beside a reference in float64 over what is checked.

    Args:
        step: that is checked.
        synchronize: until the device is done.
        rule: of the reference.
        probe: the checked values, in float64.
        new_gradients: for the step of this number; returns those of the checked values.

    Returns:
        The largest error, relative to the value where that is above 1, and the milliseconds that
        the first step took until the device was done.
    """
    exact = [Parameter(values) for values in probe()]
    expected = reference(rule, exact)
    times = []
    for number in range(CHECKED_STEPS):
        for param, grad in zip(exact, new_gradients(number), strict=True):
            param.grad = grad
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        expected.step()
    errors = [
        ((found - param).abs() / param.abs().clamp(min=1)).max()
        for found, param in zip(probe(), (param.detach() for param in exact), strict=True)
    ]
    return float(torch.stack(errors).max()), times[0]
