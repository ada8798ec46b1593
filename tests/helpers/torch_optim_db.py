"""torch's own database of optimizer cases, for our classes in place of torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from assertions import assert_no_worse, assert_same_bits
from cases import DEVICE, SCALARS, Case, Spec, double
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

pytest.importorskip("expecttest", reason="torch's own tests need it")
from torch.testing._internal import common_optimizers as common_optimizers
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, optim_db

import triton_optim

Named = dict[str, list[Tensor]]


class Config(Case):
    """A constructor configuration; every optimizer gets its own copy of a tensor in it."""

    def ours(self, params: Any, **kwargs: Any) -> Any:
        return super().ours(params, **{**copy.deepcopy(self.kwargs), **kwargs})

    def theirs(self, params: Any, **kwargs: Any) -> Any:
        return super().theirs(params, **{**copy.deepcopy(self.kwargs), **kwargs})


INFOS = [info for info in optim_db if info.name in triton_optim.OPTIMIZERS]


def configs(info: OptimizerInfo, device: str = "cpu") -> list[Config]:
    return [
        Config(f"{info.name}-{i.desc}".replace(" ", "_"), info.name, i.kwargs)
        for i in info.optim_inputs_func(device=device)
    ]


every_optimizer = pytest.mark.parametrize(
    "case", [configs(info)[-1] for info in INFOS], ids=lambda case: case.optimizer
)
every_config = pytest.mark.parametrize(
    "case", [case for info in INFOS for case in configs(info)], ids=lambda case: case.name
)


def tensors_of(optimizer: Optimizer) -> Named:
    """The parameters, and their state name by name, which must be the same for all of them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state.get(param, {}) for param in params]
    assert all(list(state) == list(states[0]) for state in states)
    named = {name: [state[name] for state in states] for name in states[0]}
    return {"param": [param.detach() for param in params], **named}


def assert_as_good(ours: Named, theirs: Named, exact: Named, specs: Sequence[Spec]) -> None:
    """Parameters and state are torch's in double precision, else no worse; steps are equal."""
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        dtype = theirs[name][0].dtype
        if name == "step":
            assert_same_bits(values, theirs[name])
        elif dtype == double(dtype):
            same = name not in SCALARS  # which lie where they are counted
            torch.testing.assert_close(
                values, theirs[name], rtol=1e-12, atol=1e-12, check_device=same
            )
        else:
            units = 1 if name == "param" else 4  # as in test_rules
            assert_no_worse(values, theirs[name], exact[name], name, units, specs)


# Those that change the momentum too, which the database leaves out.
CYCLES = [
    [lambda o: CyclicLR(o, 1e-3, 1e-2, 2, base_momentum=0.05, max_momentum=0.15)],
    [lambda o: OneCycleLR(o, 1e-2, total_steps=13, base_momentum=0.05, max_momentum=0.15)],
]


def scheduled() -> Iterator[Any]:
    """Every configuration with a set of schedulers, and all sets where only the rate is set."""
    for info in INFOS:
        *others, last = info.scheduler_inputs
        for case in configs(info):
            cycles = CYCLES if "momentum" in case.kwargs else []
            all_others = others if set(case.kwargs) <= {"lr"} else []
            for i, constructors in enumerate([last, *cycles, *all_others]):
                yield pytest.param(case, constructors, id=f"{case.name}-{i}")


def sparse() -> Iterator[Any]:
    """What the hyperparameters tuned for sparse gradients leave of the configurations."""
    for info in INFOS:
        tuned, constructors = info.metadata_for_sparse
        seen: list[dict[str, Any]] = []
        for case in [*configs(info), Config("", info.name, {"maximize": True})]:
            kwargs = {k: v for k, v in case.kwargs.items() if k not in tuned or k == "maximize"}
            if info.supports_sparse and kwargs not in seen:
                seen.append(kwargs)
                name = "-".join([info.name, *kwargs])
                config = Config(name, info.name, {**kwargs, "lr": tuned["lr"]})
                yield pytest.param(config, [], id=name)
                for i, constructor in enumerate(constructors):
                    yield pytest.param(config, [constructor], id=f"{name}-{i}")


def step_all(schedulers: Sequence[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        metrics = (loss.detach(),) if isinstance(scheduler, ReduceLROnPlateau) else ()
        scheduler.step(*metrics)


def _errors(info: OptimizerInfo, device: str) -> list[ErrorOptimizerInput]:
    """What the database lists for `device`, over tensors on the CPU."""
    with mock.patch.object(common_optimizers, "_get_device_type", return_value=device):
        errors: list[ErrorOptimizerInput] = info.optim_error_inputs_func("cpu", torch.float32)
    return errors


def errors() -> Iterator[Any]:
    """Each optimizer's own, and for all of them what any has on a GPU, about `fused`."""
    on_gpu = [error for info in INFOS for error in _errors(info, "cuda")]
    for info in INFOS:
        for error in [*_errors(info, "cpu"), *on_gpu]:
            name = f"{info.name}-{error.optimizer_error_input.desc}"
            yield pytest.param(info.name, error, id=name.replace(" ", "_"))


class LeastSquares:
    """A loss in float64; every instance starts from the same weight and bias."""

    def __init__(self, device: str = DEVICE) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((10, 5), (10,), (5,))
        draws = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        weight, bias, self._x = (draw.to(device) for draw in draws)
        self.params = [Parameter(weight), Parameter(bias)]

    def loss(self) -> Tensor:
        weight, bias = self.params
        return ((weight * self._x).sum(1) + bias).square().sum()

    def train(self, optimizer: Optimizer, schedulers: Sequence[Any] = (), steps: int = 3) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            step_all(schedulers, loss)
