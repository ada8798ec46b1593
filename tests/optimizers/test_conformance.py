"""The arithmetic under every configuration of torch's own database: as torch's for-loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import cases
import paired_optimizers
import pytest
import torch
from assertions import assert_same_bits
from cases import BLOCK, DEVICE, SCALARS, Tensors, double
from paired_optimizers import Pair
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_optim_db import (
    Config,
    LeastSquares,
    Named,
    assert_as_good,
    every_config,
    every_optimizer,
    scheduled,
    tensors_of,
)

from triton_optim.launch.variant import Variant

DTYPES = (*cases.DTYPES, torch.complex128)
SPECS = tuple(spec for spec in cases.SPECS if spec.name in ("0-dim", "empty", "2d"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_config
def test_the_default_way_and_fused(
    case: Config, dtype: torch.dtype, launches: list[Variant]
) -> None:
    """Side by side for seven steps; no gradient at the third.

    One parameter is frozen at the fourth, and at the fifth with a gradient all the same.
    """
    default, fused, torchs, exact = runs = [
        Tensors(dtype, kept, SPECS) for kept in (dtype, dtype, dtype, double(dtype))
    ]
    makers = (case.ours, default), (case.theirs, torchs), (case.theirs, exact)
    optimizers = [make(tensors.params) for make, tensors in makers]
    optimizers[0].add_param_group({"params": fused.params, "fused": True})
    for step in range(7):
        for tensors in runs:
            tensors.new_gradients()
            tensors.params[2].requires_grad_(step not in (3, 4))
            if step == 3:
                tensors.params[2].grad = None
        for optimizer in optimizers:
            if step == 2:
                optimizer.zero_grad()
            optimizer.step()
    assert len(launches) == 6
    both, theirs, reference = map(tensors_of, optimizers)
    of_default = {name: tensors[: len(SPECS)] for name, tensors in both.items()}
    of_fused = {name: tensors[len(SPECS) :] for name, tensors in both.items()}
    assert_same_bits(of_fused, of_default)
    assert_as_good(of_default, theirs, reference, SPECS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_config
def test_a_float32_checkpoint_for_parameters_of_another_dtype(
    case: Config, dtype: torch.dtype
) -> None:
    source = Tensors(torch.float32, specs=SPECS)
    saved = case.ours(source.params)
    source.train(saved, 2)
    runs = [Tensors(dtype, kept, SPECS) for kept in (dtype, dtype, double(dtype))]
    ours, theirs = case.ours(runs[0].params), case.theirs(runs[1].params)
    exact = case.theirs(runs[2].params)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    exact.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (theirs, exact):  # torch casts scalars as if they were of the parameters
        for mine, state in zip(saved.state.values(), optimizer.state.values(), strict=True):
            state.update({name: mine[name].clone() for name in SCALARS & mine.keys()})
    assert_same_bits(tensors_of(ours), tensors_of(theirs))
    for tensors, optimizer in zip(runs, (ours, theirs, exact), strict=True):
        if optimizer is not ours:
            optimizer.param_groups[0]["foreach"] = False
        tensors.train(optimizer, 1)
    assert_as_good(tensors_of(ours), tensors_of(theirs), tensors_of(exact), SPECS)


def _joined(optimizers: Sequence[Optimizer]) -> Named:
    """As if they were one."""
    named = [tensors_of(optimizer) for optimizer in optimizers]
    return {name: [tensor for part in named for tensor in part[name]] for name in named[0]}


@every_optimizer
def test_one_optimizer_for_every_dtype(case: Config) -> None:
    """To the bit what one optimizer a dtype would do."""
    together, apart = ([Tensors(dtype, specs=SPECS[:1]) for dtype in DTYPES] for _ in range(2))
    optimizer = case.ours([tensors.params[0] for tensors in together])
    others = [case.ours(tensors.params) for tensors in apart]
    for _ in range(2):
        for tensors in together:
            tensors.new_gradients()
        optimizer.step()
        for tensors, other in zip(apart, others, strict=True):
            tensors.train(other, 1)
    assert_same_bits(_joined(others), tensors_of(optimizer))


@every_config
def test_groups_are_several_optimizers(case: Config) -> None:
    """To the bit."""
    changes: list[dict[str, Any]] = [
        {},
        {"weight_decay": 0.3, "lr": 0.5},
        {"maximize": not case.kwargs.get("maximize", False)},
        {"lr": 1e-28, "fused": True},
    ]
    if case.optimizer == "Rprop":
        del changes[1]["weight_decay"]
        changes[3]["step_sizes"] = (1e-28, 1.0)
    together, apart = (Tensors(torch.float32, specs=paired_optimizers.SPECS) for _ in range(2))
    groups = [{"params": p, **change} for p, change in zip(together.params, changes, strict=True)]
    optimizer = case.ours(groups)
    others = [case.ours([p], **change) for p, change in zip(apart.params, changes, strict=True)]
    for group, change in zip(optimizer.param_groups, changes, strict=True):
        assert change.items() <= group.items()
    start = together.params[3].detach().clone()
    for _ in range(2):
        together.train(optimizer, 1)
        apart.new_gradients()
        for other in others:
            other.step()
    assert_same_bits(_joined(others), tensors_of(optimizer))
    assert_same_bits(together.params[3].detach(), start)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@every_config
def test_learning_rate_as_a_tensor(case: Config, shape: tuple[int, ...]) -> None:
    """In float64, for torch divides by Adagrad's decay in the tensor's dtype, and we do not."""
    rate = torch.full(shape, 0.25, dtype=torch.float64, requires_grad=True)
    both = Pair(case._replace(kwargs={**case.kwargs, "lr": rate}))
    # before 2.12 torch takes no other shape
    both.optimizers[1].param_groups[0]["lr"] = rate.detach().clone().view(())
    both.step()
    both.each(lambda optimizer, _: optimizer.param_groups[0]["lr"].data.mul_(0.5))
    both.step()


def test_weight_decay_as_a_tensor() -> None:
    """Only torch's SGD takes one."""
    Pair(Config("sgd", "SGD", {"weight_decay": torch.tensor(0.3)})).step(3)


@pytest.mark.parametrize(("case", "constructors"), list(scheduled()))
def test_schedulers_and_groups(
    case: Config, constructors: Sequence[Any], launches: list[Variant]
) -> None:
    """As torch's, and in the right direction."""
    problems = LeastSquares(), LeastSquares()
    for problem, make in zip(problems, (case.ours, case.theirs), strict=True):
        weight, bias = problem.params
        optimizer = make([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
        before = problem.loss()
        problem.train(optimizer, [new(optimizer) for new in constructors], steps=12)
        assert (problem.loss() > before) == case.kwargs.get("maximize", False)
    assert len(launches) == 12
    ours, theirs = (problem.params for problem in problems)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@every_config
def test_complex_is_real_and_imaginary(
    case: Config, dtype: torch.dtype, launches: list[Variant]
) -> None:
    """To the bit, in one launch: as one real tensor, and as two."""
    whole = Parameter(torch.randn(BLOCK // 2 + 1, dtype=dtype, device=DEVICE))
    pairs = Parameter(torch.view_as_real(whole.detach()).clone())
    parts = [Parameter(part.clone()) for part in pairs.detach().unbind(-1)]
    optimizer = case.ours([whole, pairs, *parts])
    for _ in range(2):
        whole.grad = torch.randn_like(whole)
        pairs.grad = torch.view_as_real(whole.grad)
        parts[0].grad, parts[1].grad = whole.grad.real, whole.grad.imag
        optimizer.step()
    assert len(launches) == 2
    for name, (of_whole, of_pairs, *of_parts) in tensors_of(optimizer).items():
        if name not in SCALARS:
            assert_same_bits(of_pairs, torch.view_as_real(of_whole))
            assert_same_bits(of_parts, list(of_pairs.unbind(-1)))
