"""Rounding to either neighbour: with the right probabilities, and the same wherever it is done."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from assertions import assert_same_bits
from cases import CASES, DEVICE, Case, Tensors, each, every_state, scaled_step
from small_tensors import SMALL
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.kernels import formats
from triton_optim.launch import backend, tuning

NOISES = 1 << 16
FORMATS = {torch.bfloat16: formats.BFLOAT16_STOCHASTIC, torch.float16: formats.FLOAT16_STOCHASTIC}
both = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _round(x_ptr, y_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One number with each noise that there is."""
    noise = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + noise * 0)
    tl.store(y_ptr + noise, formats.round_stochastically(x, noise.to(tl.uint32), FORMAT))


def rounded(value: float, dtype: torch.dtype) -> Tensor:
    y = torch.empty(NOISES, dtype=dtype, device=DEVICE)
    x = torch.tensor([value], device=DEVICE)
    _round[(NOISES // 4096,)](x, y, FORMATS[dtype], 4096)
    return y


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of the dtype that is no larger, and the smallest that is larger."""
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    up, down = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    low = nearest if nearest.double() <= value else torch.nextafter(nearest, down)
    return float(low), float(torch.nextafter(low, up))


@both
@pytest.mark.parametrize("value", [1.0, 1.0001, -1.0001, 3.14159, 1e-3, -77.77, 6e4, 6.1e-5, 2e-7])
def test_probabilities_are_exact(value: float, dtype: torch.dtype) -> None:
    """Of all noises just as many round up as the value is nearer to what is above.

    float16 has 13 bits less than float32, and more where it is subnormal: 2^-13 of it is seen.
    """
    value = float(torch.tensor(value))
    low, high = neighbours(value, dtype)
    results, counts = rounded(value, dtype).double().unique(return_counts=True)
    assert {*results.tolist()} <= {low, high}
    mean = float((results * counts).sum() / NOISES)
    resolution = 0 if dtype == torch.bfloat16 or abs(value) >= 2**-14 else 2**-13
    assert abs(mean - value) <= resolution * (high - low)
    share = (mean - low) / (high - low)
    variance = float(((results - mean) ** 2 * counts).sum() / NOISES)
    assert variance == pytest.approx(share * (1 - share) * (high - low) ** 2, rel=1e-9, abs=1e-300)


@both
def test_subnormal_numbers_and_signs(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for value, results in ((0.25 * tiny, {0.0, tiny}), (-2.5 * tiny, {-2 * tiny, -3 * tiny})):
        y = rounded(value, dtype)
        assert {*y.double().tolist()} == results
        assert float(y.double().mean()) == pytest.approx(value, rel=2e-4)
    assert (rounded(-0.0, dtype).view(torch.int16) == -(2**15)).all()


@both
def test_largest_numbers_infinities_and_nan(dtype: torch.dtype) -> None:
    """The largest finite value stays it; beyond, numbers go to nearest."""
    largest = torch.finfo(dtype).max
    below = float(torch.nextafter(torch.tensor(largest), torch.tensor(0.0)))
    assert {*rounded(below, dtype).tolist()} <= {largest, *neighbours(below, dtype)}
    for value in (largest, -largest, torch.inf, -torch.inf):
        assert {*rounded(value, dtype).tolist()} == {value}
    beyond = float(torch.nextafter(torch.tensor(largest), torch.tensor(torch.inf)))
    assert {*rounded(-beyond, dtype).tolist()} == {-largest}
    assert rounded(torch.nan, dtype).isnan().all()


@both
@each([case for case in CASES if case.name.endswith("-all") or case.name == "nadam"])
def test_every_rule_rounds_to_neighbours(case: Case, dtype: torch.dtype) -> None:
    """Of what it gives in float32: state and parameters, step by step from the same ones."""
    ours, exact = Tensors(dtype, dtype, SMALL), Tensors(dtype, torch.float32, SMALL)
    lr = 2.0**-7  # which Rprop's first state is, in any dtype
    optimizer = case.ours(ours.params, lr=lr, stochastic_rounding=True)
    reference = case.ours(exact.params, lr=lr)
    for _ in range(3):
        for tensors, stepped in ((ours, optimizer), (exact, reference)):
            tensors.new_gradients()
            stepped.step()
        moved = 0
        for p, q in zip(ours.params, exact.params, strict=True):
            pairs = [(p.data, q.data)]
            pairs += [
                (value, reference.state[q][name])
                for name, value in optimizer.state[p].items()
                if isinstance(value, Tensor) and value.dtype == dtype
            ]
            for value, right in pairs:
                unit = torch.maximum(
                    value.float().abs() * torch.finfo(dtype).eps,
                    torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps),
                )
                assert ((value.float() - right).abs() <= unit * (1 + 1e-3)).all()
                moved += int((value != right.to(dtype)).sum())
                right.copy_(value)
        assert moved > 0


def trained(
    seed: int = 0, steps: int = 4, cls: Any = triton_optim.AdamW, **kwargs: Any
) -> list[Tensor]:
    tensors = Tensors(torch.bfloat16, torch.bfloat16, SMALL)
    kwargs = {"stochastic_rounding": True, "rounding_seed": seed, **kwargs}
    tensors.train(cls(tensors.params, **kwargs), steps)
    return [param.detach() for param in tensors.params]


def test_a_seed_repeats_and_another_one_does_not() -> None:
    assert_same_bits(trained(5), trained(5))
    assert not torch.equal(trained(5)[2], trained(6)[2])
    assert not torch.equal(trained(2**40)[2], trained(0)[2])


def test_bits_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained()
    if backend.COMPILED:
        config = tuning.Config(512, 2)
        monkeypatch.setattr(tuning, "config", lambda *_, **__: config)
    else:
        monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (256,))
    assert_same_bits(trained(), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_neighbour_makes_no_difference(groups: int) -> None:
    """A parameter is rounded by its place, whatever gradients others have."""
    results = []
    for alone in (True, False):
        tensors = Tensors(torch.bfloat16, torch.bfloat16, SMALL[2:])
        first, *others = tensors.params
        params = [{"params": [first]}, {"params": others}] if groups == 2 else tensors.params
        optimizer = triton_optim.SGD(params, lr=0.1, momentum=0.9, stochastic_rounding=True)
        for _ in range(3):
            tensors.new_gradients()
            if alone:
                for param in others:
                    param.grad = None
            optimizer.step()
        results.append(first.detach())
    assert_same_bits(*results)


@every_state
@pytest.mark.parametrize("how", ["dict", "file", "deepcopy"])
def test_resumed_to_the_bit(case: Case, how: str) -> None:
    tensors = Tensors(torch.bfloat16, torch.bfloat16, SMALL)
    optimizer = case.ours(tensors.params, stochastic_rounding=True)
    tensors.train(optimizer, 2)
    copied = copy.deepcopy(tensors)
    if how == "deepcopy":
        copied, other = copy.deepcopy((tensors, optimizer))
    else:
        saved = optimizer.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other = case.ours(copied.params, stochastic_rounding=True)
        other.load_state_dict(copy.deepcopy(saved))
    tensors.train(optimizer, 2)
    copied.train(other, 2)
    assert_same_bits([p.detach() for p in copied.params], [p.detach() for p in tensors.params])
    assert_same_bits(other.state_dict(), optimizer.state_dict())


def test_a_skipped_step_uses_no_random_number_up() -> None:
    results = []
    for bad in ((), (1,)):
        tensors = Tensors(torch.bfloat16, torch.bfloat16, SMALL)
        optimizer = triton_optim.AdamW(
            tensors.params, stochastic_rounding=True, max_grad_norm=1e9, skip_nonfinite=True
        )
        for step in range(3 + len(bad)):
            if step in bad:
                before = copy.deepcopy(tensors.params)
                tensors.params[0].grad = torch.full_like(tensors.params[0], torch.nan)
                optimizer.step()
                assert_same_bits(tensors.params, before)
            else:
                tensors.new_gradients()
                optimizer.step()
        results.append([param.detach() for param in tensors.params])
    assert_same_bits(*results)


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"master_weight_bits": 32}])
def test_a_step_that_a_scaler_skips_changes_nothing(options: dict[str, Any]) -> None:
    results = []
    for skipped in ((), (0, 2)):
        tensors = Tensors(torch.bfloat16, torch.bfloat16, SMALL[2:])
        optimizer = triton_optim.AdamW(tensors.params, fused=True, **options)
        for step in range(2 + len(skipped)):
            if step not in skipped:
                tensors.new_gradients()
            for param in tensors.params:
                param.grad = torch.ones_like(param) if param.grad is None else param.grad
            before = copy.deepcopy([tensors.params, optimizer.state_dict()["state"]])
            scaled_step(optimizer, float(step in skipped), 1.0)
            if step in skipped[1:]:
                assert_same_bits([tensors.params, optimizer.state_dict()["state"]], before)
        results.append([tensors.params, optimizer.state_dict()["state"]])
    assert_same_bits(*results)


def test_small_updates_add_up() -> None:
    """Under half a unit: to nearest nothing moves, stochastically the mean does."""
    moved = []
    for rounding in (None, True):
        param = Parameter(torch.ones(64, 16, dtype=torch.bfloat16, device=DEVICE))
        optimizer = triton_optim.SGD([param], lr=2.0**-11, stochastic_rounding=rounding)
        param.grad = torch.ones_like(param)
        for _ in range(24):
            optimizer.step()
        moved.append(float(1 - param.detach().double().mean()))
    assert moved[0] == 0
    # a unit below 1 is 2^-8: a step goes down with probability 1/8
    deviation = (24 * 2**-3 * (1 - 2**-3) / 1024) ** 0.5 * 2**-8
    assert abs(moved[1] - 24 * 2**-11) < 4 * deviation
