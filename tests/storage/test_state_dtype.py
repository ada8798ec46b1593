"""State in another dtype than its parameter: kept, rounded, saved and loaded."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import (
    SCALARS,
    STATEFUL_CASES,
    Case,
    Spec,
    Tensors,
    each,
    grad_of,
    with_state,
)  # fmt: skip
from torch import Tensor

import triton_optim
from triton_optim.launch.launcher import record_launches

SMALL = (
    Spec("0-dim", lambda draw: draw()),
    Spec("2d", lambda draw: draw(9, 9)),
    Spec("misaligned", lambda draw: draw(20)[1:], lambda draw: draw(19)),
    Spec("transposed", lambda draw: draw(12, 8).t(), lambda draw: draw(12, 8).t()),
)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
Kept = dict[str, torch.dtype]


def kept(optimizer: Any) -> Kept:
    """Dtypes of state tensors, by name: those of all parameters are the same."""
    (found,) = {
        tuple((name, v.dtype) for name, v in s.items() if v is not None and name not in SCALARS)
        for s in optimizer.state.values()
    }
    return dict(found)


@with_state
@pytest.mark.parametrize("storage", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_it_is_kept_and_one_launch_steps_all(
    case: Case, storage: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = Tensors(storage, storage, SMALL[:2])
    optimizer = case.ours(tensors.params, state_dtype=dtype)
    with record_launches() as launches:
        tensors.train(optimizer, 1)
    assert len(launches) == 1
    assert {*kept(optimizer).values()} == {dtype}
    assert all(param.dtype == storage for param in tensors.params)


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16], ids=str)
def test_16_bits_beside_float64(dtype: torch.dtype) -> None:
    """Rounded stochastically from arithmetic in float64; float32 parameters in another launch."""
    tensors = Tensors(torch.float64, specs=SMALL), Tensors(FLOAT32, specs=SMALL)
    params = [*tensors[0].params, *tensors[1].params]
    optimizer = triton_optim.SGD(params, lr=0.1, momentum=0.5, state_dtype=dtype)
    for of in tensors:
        of.new_gradients()
    optimizer.step()
    unit = torch.finfo(dtype).eps
    for param in params:
        grad, state = grad_of(param), optimizer.state[param]["momentum_buffer"]
        assert state.dtype == dtype
        torch.testing.assert_close(state.to(grad.dtype), grad, rtol=unit, atol=0)


def test_by_name() -> None:
    tensors = Tensors(BFLOAT16, BFLOAT16, SMALL)
    optimizer = triton_optim.AdamW(
        tensors.params, state_dtype={"exp_avg": torch.float16, "exp_avg_sq": FLOAT32}
    )
    tensors.train(optimizer, 2)
    assert kept(optimizer) == {"exp_avg": torch.float16, "exp_avg_sq": FLOAT32}
    one = triton_optim.AdamW(Tensors(FLOAT32).params, state_dtype={"exp_avg": BFLOAT16})
    Tensors(FLOAT32).train(one, 0)
    assert one._stepper.options.rounds_state("exp_avg", BFLOAT16)
    assert not one._stepper.options.rounds_state("exp_avg_sq", BFLOAT16)


@with_state
def test_float32_state_of_bfloat16_parameters(case: Case) -> None:
    """As a step in float32 has it; parameters are those, rounded."""
    ours, exact = Tensors(BFLOAT16, BFLOAT16, SMALL), Tensors(BFLOAT16, FLOAT32, SMALL)
    optimizer = case.ours(ours.params, state_dtype=FLOAT32)
    reference = case.ours(exact.params)
    ours.train(optimizer, 1)
    exact.train(reference, 1)
    for p, q in zip(ours.params, exact.params, strict=True):
        assert_same_bits(p.detach(), q.detach().bfloat16())
        for name, value in reference.state[q].items():
            assert_same_bits(optimizer.state[p][name], value)


def rounding_of(dtype: torch.dtype, stochastic: bool | None) -> list[Tensor]:
    tensors = Tensors(dtype, dtype, SMALL)
    optimizer = triton_optim.RMSprop(
        tensors.params, state_dtype=BFLOAT16, stochastic_rounding=stochastic
    )
    tensors.train(optimizer, 2)
    return [optimizer.state[param]["square_avg"] for param in tensors.params]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_sixteen_bits_are_rounded_stochastically_unless_told(dtype: torch.dtype) -> None:
    nearest, told, asked = (rounding_of(dtype, how) for how in (False, None, True))
    assert not torch.equal(nearest[1], told[1])
    assert torch.equal(told[1], asked[1]) or dtype == BFLOAT16  # whose gradients differ then
    exact = Tensors(dtype, FLOAT32, SMALL)
    reference = triton_optim.RMSprop(exact.params)
    exact.train(reference, 2)
    error = [
        float((ours[1].float() - reference.state[exact.params[1]]["square_avg"]).abs().max())
        for ours in (nearest, told)
    ]
    assert 0 < error[0] < error[1]


LOADING: tuple[dict[str, Any], ...] = (
    {"master_weight_bits": 32},
    {"master_weight_bits": 32, "state_dtype": BFLOAT16},
    {"stochastic_rounding": True},
    {"state_dtype": FLOAT32},
    {"state_dtype": BFLOAT16, "stochastic_rounding": False},
    {},
)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (case, options)
        for case, options in product(STATEFUL_CASES, LOADING)
        if case.name != "sgd" or "state_dtype" not in options  # which keeps no state
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("storage", [FLOAT32, BFLOAT16], ids=str)
def test_checkpoints_of_torch_load_into_every_format(
    case: Case, options: dict[str, Any], storage: torch.dtype
) -> None:
    """And what is saved from it loads into torch's optimizer, which goes on."""
    theirs = Tensors(storage, storage, SMALL)
    reference = case.theirs(theirs.params)
    theirs.train(reference, 2)
    ours = Tensors(BFLOAT16, BFLOAT16, SMALL)
    optimizer = case.ours(ours.params, **options)
    before = copy.deepcopy(reference.state_dict())
    optimizer.load_state_dict(before)
    for q, p in zip(theirs.params, ours.params, strict=True):
        for name, value in reference.state[q].items():
            if value is not None and name not in SCALARS:
                loaded = optimizer.state[p][name]
                assert_same_bits(loaded, value.to(loaded.dtype))
    ours.train(optimizer, 1)
    saved = optimizer.state_dict()
    reference.load_state_dict(copy.deepcopy(saved))
    theirs.train(reference, 1)
    back = case.ours(ours.params, **options)
    back.load_state_dict(copy.deepcopy(saved))
    assert_same_bits(back.state_dict(), optimizer.state_dict())


def test_a_remainder_is_dropped_where_none_is_kept() -> None:
    tensors = Tensors(BFLOAT16, BFLOAT16, SMALL)
    optimizer = triton_optim.AdamW(tensors.params, master_weight_bits=32)
    tensors.train(optimizer, 1)
    other = triton_optim.AdamW(tensors.params, stochastic_rounding=True)
    other.load_state_dict(optimizer.state_dict())
    assert kept(other) == {"exp_avg": BFLOAT16, "exp_avg_sq": BFLOAT16}
    tensors.train(other, 1)


@each([Case("adagrad", "Adagrad", {"initial_accumulator_value": 0.1})])
def test_state_that_torch_makes_at_once(case: Case) -> None:
    """Not rounded to bfloat16 on its way."""
    tensors = Tensors(BFLOAT16, BFLOAT16, SMALL)
    optimizer = case.ours(tensors.params[:2], state_dtype=FLOAT32)
    optimizer.add_param_group({"params": tensors.params[2:]})
    tensors.train(optimizer, 1)
    reference = Tensors(BFLOAT16, FLOAT32, SMALL)
    exact = case.ours(reference.params)
    reference.train(exact, 1)
    for p, q in zip(tensors.params, reference.params, strict=True):
        assert_same_bits(optimizer.state[p]["sum"], exact.state[q]["sum"])


def test_counted_on_the_device_steps_give_the_same_random_numbers() -> None:
    results: list[list[Tensor]] = []
    for norm in (None, 1e9):
        tensors = Tensors(BFLOAT16, BFLOAT16, SMALL)
        optimizer = triton_optim.NAdam(
            tensors.params, stochastic_rounding=True, max_grad_norm=norm,
            skip_nonfinite=norm is not None,
        )  # fmt: skip
        tensors.train(optimizer, 3)
        results.append([param.detach() for param in tensors.params])
    for one, other in zip(*results, strict=True):  # clipping multiplies by 1
        assert_same_bits(one, other)
