"""What wraps an optimizer reads and writes the optimizer's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE, new_param
from torch.nn import Parameter

import triton_optim

OPTIONS = {"max_grad_norm": 0.5, "skip_nonfinite": True}


def _passing_on(optimizer: Any) -> Any:
    """A dynamic subclass, with a `__dict__` of its own, that passes on what it has not."""

    def __getattr__(self: Any, name: str) -> Any:
        return getattr(vars(self)["wrapped"], name)

    kind: Any = type("Wrapper", (type(optimizer),), {"__getattr__": __getattr__})
    wrapper = object.__new__(kind)
    vars(wrapper)["wrapped"] = optimizer
    return wrapper


def _copying(optimizer: Any) -> Any:
    """A dynamic subclass, with a copy of the `__dict__`."""
    kind: Any = type("Wrapper", (type(optimizer),), {})
    wrapper = object.__new__(kind)
    vars(wrapper).update(vars(optimizer))
    return wrapper


def _of_lightning(optimizer: Any) -> Any:
    return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)


def _of_fabric(optimizer: Any) -> Any:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator=DEVICE, devices=1)
    return fabric.setup_optimizers(optimizer)


integration = pytest.mark.integration
wrappers = pytest.mark.parametrize(
    "wrap",
    [
        _passing_on,
        _copying,
        pytest.param(_of_lightning, marks=integration),
        pytest.param(_of_fabric, marks=integration),
    ],
)


@wrappers
@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_attributes_are_the_optimizers_own(wrap: Callable[[Any], Any], name: str) -> None:
    param = new_param(5)
    optimizer = getattr(triton_optim, name)([param], **OPTIONS)
    wrapper = wrap(optimizer)
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    assert wrapper.grad_norm == optimizer.grad_norm == 20**0.5
    param.grad.fill_(float("inf"))
    optimizer.step()
    assert wrapper.skipped_steps == optimizer.skipped_steps == 1
    wrapper.max_grad_norm = 5.0
    assert optimizer.max_grad_norm == wrapper.max_grad_norm == 5.0
    assert optimizer.defaults["max_grad_norm"] == 5.0
    assert not wrapper._step_supports_amp_scaling


@wrappers
def test_a_norm_set_through_a_wrapper_clips(wrap: Callable[[Any], Any]) -> None:
    param = Parameter(torch.zeros(4, device=DEVICE))
    optimizer = triton_optim.SGD([param], lr=1.0)
    wrap(optimizer).max_grad_norm = 1.0
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, -0.5))


REBUILT = [name for name in triton_optim.OPTIMIZERS if name != "AdamW"]  # torch's cannot be either


@pytest.mark.parametrize("name", [*REBUILT, "RowwiseAdagrad"])
def test_rebuilt_from_its_defaults(name: str) -> None:
    """As Opacus, Horovod and ZeRO do it: `type(o)(params, **o.defaults)`."""
    arguments: dict[str, dict[str, Any]] = {
        "SGD": {"momentum": 0.5, **OPTIONS},
        "Adagrad": {"lr_decay": 0.5, **OPTIONS},
        "RMSprop": {"alpha": 0.5, "fused": True, **OPTIONS},
        "Adam": {"betas": (0.5, 0.9), "decoupled_weight_decay": True, **OPTIONS},
        "Adamax": {"betas": (0.5, 0.9), "fused": True, **OPTIONS},
        "NAdam": {"momentum_decay": 0.5, **OPTIONS},
        "RAdam": {"decoupled_weight_decay": True, **OPTIONS},
        "Adadelta": {"rho": 0.5, **OPTIONS},
        "Rprop": {"etas": (0.5, 1.5), **OPTIONS},
        "ASGD": {"alpha": 0.5, "fused": True, **OPTIONS},
        "RowwiseAdagrad": {"eps": 0.5, "decoupled_weight_decay": True},
    }
    optimizer = getattr(triton_optim, name)([new_param(3)], **arguments[name])
    for original in (optimizer, copy.deepcopy(optimizer)):
        rebuilt = type(original)([new_param(3)], **original.defaults)
        assert rebuilt.defaults == optimizer.defaults
        assert rebuilt._stepper.options == optimizer._stepper.options
        rebuilt.step()
        assert rebuilt.param_groups[0].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_groups_have_torchs_keys(name: str) -> None:
    optimizer = getattr(triton_optim, name)([new_param(3)], max_grad_norm=1.0)
    optimizer.add_param_group({"params": [new_param(3)], "lr": 0.5})
    theirs = getattr(torch.optim, name)([new_param(3)])
    for group in optimizer.param_groups:
        assert group.keys() == theirs.param_groups[0].keys()


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite", "error_if_nonfinite"])
def test_a_group_cannot_have_an_option_of_the_whole(option: str) -> None:
    group = {"params": [new_param(3)], option: 1.0}
    with pytest.raises(ValueError, match=f"{option} is for the whole optimizer"):
        triton_optim.SGD([group])
    optimizer = triton_optim.SGD([new_param(3)])
    with pytest.raises(ValueError, match=f"{option} is for the whole optimizer"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_a_group_with_an_option_that_the_class_does_not_take() -> None:
    group = {"params": [new_param(3)], "decoupled_weight_decay": True}
    with pytest.raises(ValueError, match="Adamax takes none; leave it out"):
        triton_optim.Adamax([group])
