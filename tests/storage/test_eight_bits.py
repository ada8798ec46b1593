"""Numbers of 8 bits: right in the mean, no denominator of 0, infinities and NaN."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from assertions import assert_same_bits
from cases import DEVICE
from torch import Tensor

from triton_optim.kernels import float8 as kernels
from triton_optim.tensors import float8
from triton_optim.tensors.float8 import GROUP_SIZE

NOISES = 1 << 16
kinds = pytest.mark.parametrize("denominator", [True, False], ids=["e5m3", "e4m3"])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _round_trip(  # type: ignore[no-untyped-def]
    x_ptr, noise_ptr, y_ptr, codes_ptr, exponents_ptr, DENOMINATOR: tl.constexpr, N: tl.constexpr
):
    group = tl.program_id(0)
    offsets = group * N + tl.arange(0, N)
    x, noise = tl.load(x_ptr + offsets), tl.load(noise_ptr + offsets).to(tl.uint32)
    if DENOMINATOR:
        codes, exponents = kernels.encode_e5m3(x, noise)
    else:
        codes, exponents = kernels.encode_e4m3(x, noise)
    tl.store(codes_ptr + offsets, codes)
    tl.store(exponents_ptr + group + tl.arange(0, 1), exponents)
    y = (
        kernels.decode_e5m3(codes, exponents)
        if DENOMINATOR
        else kernels.decode_e4m3(codes, exponents)
    )
    tl.store(y_ptr + offsets, y)


def round_trip(x: Tensor, noise: Tensor, *, denominator: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values, codes and exponents. x: [groups, 256]; noise: of the same shape, or a number."""
    x = x.to(DEVICE).contiguous()
    y, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    exponents = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    noise = noise.int().expand_as(x).contiguous().to(DEVICE)
    _round_trip[(len(x),)](x, noise, y, codes, exponents, denominator, GROUP_SIZE)
    return y, codes, exponents


def wide_values(n_groups: int, *, denominator: bool) -> Tensor:
    """Over many binades in a group, and groups over more."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n_groups, GROUP_SIZE, generator=draw)
    x *= torch.exp2(4 * torch.randn(x.shape, generator=draw))
    x *= torch.exp2(torch.randint(-60, 60, (n_groups, 1), generator=draw))
    return x.abs() if denominator else x


@kinds
@pytest.mark.parametrize("share", [1.0, 0.87, 0.3, 2**-3 * 1.1, 2**-10 * 1.7, 2**-16 * 1.9])
def test_rounded_right_in_the_mean(share: float, denominator: bool) -> None:
    """Over noises from the smallest to the largest, beside a largest element."""
    value = 1.3 * share
    noise = torch.arange(16, NOISES, 32).view(-1, GROUP_SIZE // 2).repeat(1, 2)
    x = torch.full(noise.shape, value)
    x[:, 0] = 1.3
    y, *_ = round_trip(x, noise, denominator=denominator)
    column = y[:, GROUP_SIZE // 2 :].double()  # without the largest; each noise once
    values = column.unique()
    assert len(values) <= 2
    assert float(values[0]) <= float(x[1, 1]) <= float(values[-1])
    unit = float(values[-1] - values[0])
    assert abs(float(column.mean()) - float(x[1, 1])) <= unit * 2**-11


@kinds
def test_torchs_side_is_the_kernels(denominator: bool) -> None:
    """Codes to nearest, and what every code means."""
    x = wide_values(24, denominator=denominator)
    x[0] = 0
    x[1, 3], x[2, 5], x[2, 6] = torch.inf, torch.nan, -torch.inf if not denominator else torch.inf
    codes, exponents = float8.encode(x, is_denominator=denominator)
    ours = float8.decode(codes, exponents, is_denominator=denominator)
    y, again, same = round_trip(ours.float(), torch.tensor(0x8000), denominator=denominator)
    torch.testing.assert_close(y.cpu(), ours.float(), rtol=0, atol=0, equal_nan=True)
    assert_same_bits(float8.decode(again.cpu(), same.cpu(), is_denominator=denominator), ours)
    error = ((ours.double() - x) / x).nan_to_num(0, 0, 0).abs()
    large = x.abs() > x.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True) * 2**-13
    assert error[large].max() <= 2**-4


@kinds
def test_what_is_decoded_and_encoded_keeps_its_value(denominator: bool) -> None:
    """Whatever the noise: a power of two for a group moves no code."""
    x = wide_values(16, denominator=denominator)
    noise = torch.randint(NOISES, x.shape, generator=torch.Generator().manual_seed(1))
    y, *_ = round_trip(x, noise, denominator=denominator)
    for other in (torch.tensor(0), torch.tensor(NOISES - 1), noise.flip(0)):
        assert_same_bits(round_trip(y, other, denominator=denominator)[0], y)


def test_no_denominator_is_zero() -> None:
    x = wide_values(4, denominator=True)
    x[0], x[1, 1:], x[2] = 0, 0, 1e-45
    for noise in (0, NOISES - 1):
        y, *_ = round_trip(x, torch.tensor(noise), denominator=True)
        assert (y > 0).all()
        assert (y[0] <= 2.0**-125).all()


@kinds
def test_infinities_and_nan_are_of_one_element(denominator: bool) -> None:
    x = wide_values(2, denominator=denominator)
    plain, *_ = round_trip(x, torch.tensor(77), denominator=denominator)
    at = [3, 100, 101]
    x[:, at] = torch.tensor([torch.inf, torch.nan, torch.inf if denominator else -torch.inf])
    y, *_ = round_trip(x, torch.tensor(77), denominator=denominator)
    assert_same_bits(y[:, at].cpu(), x[:, at])
    others = [i for i in range(GROUP_SIZE) if i not in at]
    assert_same_bits(y[:, others], plain[:, others])


def test_the_largest_numbers() -> None:
    x = torch.full((1, GROUP_SIZE), torch.finfo(torch.float32).max)
    for noise in (0, NOISES - 1):
        y, *_ = round_trip(-x, torch.tensor(noise), denominator=False)
        assert (y < 0).all()
        assert (y > -torch.inf).all()


@kinds
def test_no_finite_number_becomes_infinite(denominator: bool) -> None:
    for largest in (1.6, 1.7, 1.99):
        noise = torch.tensor([[0], [NOISES - 1]]).expand(2, GROUP_SIZE)
        y, *_ = round_trip(torch.full((2, GROUP_SIZE), largest), noise, denominator=denominator)
        assert (y <= 2).all()
