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
from philox import philox
from small_tensors import SMALL
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.kernels import formats, random_bits
from triton_optim.launch import backend, tuning
from triton_optim.launch.formats import random_key

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


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _draw(  # type: ignore[no-untyped-def]
    out_ptr, offset, columns, pitch, key, step,
    SLOT: tl.constexpr, SHARDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    random = (
        tl.full((), offset, tl.int64), tl.full((), columns, tl.int64),
        tl.full((), pitch, tl.int64), tl.full((), key, tl.int64), tl.full((), step, tl.int64),
    )  # fmt: skip
    bits = random_bits.random_bits(start, random, SLOT, BLOCK, SHARDING)
    tl.store(out_ptr + start + tl.arange(0, BLOCK), bits.to(tl.int32))


def drawn(
    sharding: int = 0,
    offset: int = 0,
    columns: int = 1 << 40,
    pitch: int = 1 << 40,
    *,
    n: int = 512,
    block: int = 256,
    key: int = 123456789012345,
    step: int = 7,
    slot: int = 0,
) -> Tensor:
    out = torch.empty(n, dtype=torch.int32, device=DEVICE)
    _draw[(n // block,)](out, offset, columns, pitch, key, step, slot, sharding, block)
    return out.cpu()


def test_bits_are_those_of_philox() -> None:
    """Of Salmon et al., of 7 rounds: the counter is the element's eighth, slot, step and key."""
    expected = []
    for group in range(4):
        words = philox((group, 1 << 29, (12345 + 7) % 2**32, 9), 0x243F6A8885A308D3, rounds=7)
        expected += [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert drawn(n=32, block=32, key=12345 + (9 << 32), slot=1).tolist() == expected


def test_bits_do_not_depend_on_blocks_or_on_how_they_are_found() -> None:
    whole = drawn(n=512)
    for block in (32, 128, 512):
        assert torch.equal(drawn(n=512, block=block), whole)
    for offset in (8, 104):
        assert torch.equal(drawn(0, offset, n=256), whole[offset : offset + 256])
    for offset in (1, 3, 13, 160):
        assert torch.equal(drawn(2, offset, n=256), whole[offset : offset + 256])
    rows = whole.view(16, 32)
    for sharding, start, columns in ((1, 8, 16), (2, 8, 16), (2, 3, 4), (2, 31, 1)):
        part = rows[:, start : start + columns].flatten()
        got = drawn(sharding, start, columns, 32, n=16 * columns, block=16)
        assert torch.equal(got, part), (sharding, start, columns)
    far = (1 << 35) + 24  # elements
    assert torch.equal(drawn(0, far, n=64, block=64), drawn(2, far, n=64, block=64))


def test_other_steps_keys_and_slots_have_other_bits() -> None:
    streams = [
        drawn(),
        *(drawn(step=step) for step in (8, 7 + 2**32 - 1)),
        *(drawn(key=key) for key in (random_key(0, 0, 1), random_key(0, 1, 0), -5)),
        *(drawn(slot=slot) for slot in (1, 2, 3)),
        drawn(offset=1 << 35),
    ]
    for i, stream in enumerate(streams):
        # 16 bits, evenly: 512 of them, each bit with a standard deviation of 11.3
        ones = torch.stack([(stream >> k & 1).sum() for k in range(16)])
        assert ((ones - 256).abs() < 5 * 11.3).all()
        for other in streams[:i]:
            assert (stream == other).sum() < 4
    assert torch.equal(drawn(key=-5), drawn(key=-5))


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
