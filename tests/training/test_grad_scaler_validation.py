"""Scales and gradients that the kernels cannot unscale: errors, or the scaler unscales itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import raises
from cases import DEVICE, new_param
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [torch.ones((), device="meta"), torch.ones(2), 1.0], ids=str)
def test_a_scale_that_the_kernel_cannot_read(name: str, value: Any) -> None:
    param = new_param(5)
    optimizer = triton_optim.RMSprop([param])
    optimizer.step()
    setattr(optimizer, name, value)
    with raises(f"optimizer.{name} is ", optimizer, [param]):
        optimizer.step()


def test_an_expanded_gradient_cannot_be_unscaled() -> None:
    param = new_param(5, 6)
    param.grad = torch.ones(5, 1, device=DEVICE).expand(5, 6)
    optimizer = triton_optim.SGD([param])
    vars(optimizer)["grad_scale"] = torch.ones((), device=DEVICE)
    with raises("is expanded", optimizer, [param]):
        optimizer.step()


def test_one_gradient_of_two_parameters() -> None:
    params = [new_param(5), new_param(5)]
    params[0].grad = params[1].grad
    optimizer = triton_optim.SGD(params)
    optimizer.step()
    vars(optimizer)["grad_scale"] = torch.ones((), device=DEVICE)
    with raises("one gradient tensor", optimizer, params):
        optimizer.step()
    assert "grad_scale" not in vars(optimizer)  # a scaler would multiply its next scale by it


def test_a_scaler_without_gradients() -> None:
    """It tells an int: the sum of nothing."""
    optimizer = triton_optim.RMSprop([Parameter(torch.ones(3, device=DEVICE))])
    vars(optimizer).update(found_inf=0, grad_scale=torch.ones((), device=DEVICE))
    optimizer.step()
    assert not optimizer.state


def test_no_kernel_no_unscaling_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device, and where torch's implementation was asked for in a group or loaded."""
    param = Parameter(torch.ones(4, device=DEVICE))
    optimizer = triton_optim.SGD([param], fused=True)
    assert optimizer._step_supports_amp_scaling
    for key, value in (("fused", None), ("fused", False), ("foreach", True)):
        before = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        assert not optimizer._step_supports_amp_scaling
        optimizer.param_groups[0][key] = before
    monkeypatch.setattr(backend, "DEVICE_TYPE", "another")
    assert not optimizer._step_supports_amp_scaling
    monkeypatch.undo()
    optimizer._step_supports_amp_scaling = False
    assert not optimizer._step_supports_amp_scaling
