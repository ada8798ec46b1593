"""The check of a step: beside plain torch in float64."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lab.device import Device
from lab.implementations import Implementation, Step
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


class Work:
    """Tensors that all implementations step in turn, and the check that they step them rightly.

    Attributes:
        rule: of the steps.
    """

    rule: Rule

    def drawn(self) -> dict[str, Any]:
        """What else a row says, that only the drawn tensors tell."""
        return {}

    def needed(self, implementation: Implementation) -> tuple[int, int]:
        """Bytes that it keeps beside what all share, and that its steps take; 0: few."""
        return 0, 0

    def copies(self, device: Device) -> dict[str, tuple[Step, int]]:
        """Copies beside the plain one, and their bytes."""
        return {}

    def probed(self, step: Any) -> list[Tensor]:
        """The checked values, in float64. Rules work element by element, or row by row."""
        raise NotImplementedError

    def new_probed_gradients(self, step: Any, number: int) -> list[Tensor]:
        """Give the step of this number new gradients; returns those of the checked values."""
        raise NotImplementedError

    def check(self, step: Step, synchronize: Step) -> tuple[float, float]:
        """Take steps with new gradients, beside a reference in float64 over what is checked.

        Args:
            step: that is checked.
            synchronize: until the device is done.

        Returns:
            The largest error, relative to the value where that is above 1, and the milliseconds
            that the first step took until the device was done.
        """
        exact = [Parameter(values) for values in self.probed(step)]
        expected = reference(self.rule, exact)
        times = []
        for number in range(CHECKED_STEPS):
            for param, grad in zip(exact, self.new_probed_gradients(step, number), strict=True):
                param.grad = grad
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))
            expected.step()
        errors = [
            ((found - param).abs() / param.abs().clamp(min=1)).max()
            for found, param in zip(self.probed(step), [p.detach() for p in exact], strict=True)
        ]
        return float(torch.stack(errors).max()), times[0]
