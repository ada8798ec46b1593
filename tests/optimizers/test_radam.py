"""RAdam across the step from which on its variance is tractable."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, Case
from reference import Reference
from torch.nn import Parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta2", [0.0, 0.6, 0.9, 0.99, 0.999, 0.99999])
def test_across_the_switch(beta2: float, dtype: torch.dtype) -> None:
    """After every step the error is torch's at the most, but for a unit a step.

    The switch is at step 6, where rho_t is 5.0 at step 5 but for 4e-5 if beta2 is 0.99999.
    """
    kwargs = {"lr": 0.1, "betas": (0.9, beta2)}
    case = Case("radam", "RAdam", kwargs)
    start = torch.linspace(-1, 1, 50, dtype=torch.float64, device=DEVICE).to(dtype)
    params = [Parameter(start.clone()) for _ in range(2)]
    optimizers = [case.ours(params[:1], fused=True), case.theirs(params[1:])]
    exact = Reference("RAdam", start, **kwargs)
    for step in range(1, 11):
        grad = torch.randn_like(start)
        exact.step(grad)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        unit = exact.unit() * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
        assert exact.error(params[0]) <= exact.error(params[1]) + step * unit
