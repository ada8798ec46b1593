"""The kernels' conversions, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE

from triton_optim.kernels import numerics


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _convert(x_ptr, y_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    DECODES: tl.constexpr = DTYPE == tl.float32  # noqa: SIM300
    y = numerics.decode(x, tl.float32) if DECODES else numerics.encode(x, DTYPE)
    tl.store(y_ptr + offsets, y)


def _converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    _convert[(len(x) // 4096,)](x, y, getattr(tl, name), 4096)
    return y


def test_every_bfloat16_is_widened_exactly() -> None:
    x = torch.arange(65536, device=DEVICE).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(
        _converted(x, torch.float32), x.float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Random bits, every high half with the low halves around a tie, NaN and infinities."""
    high = torch.arange(65536).repeat_interleave(6) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(65536)
    bits = torch.cat([high | low, torch.randint(2**32, (2**17,))])
    x = (bits - (bits >= 2**31) * 2**32).to(torch.int32).view(torch.float32).to(DEVICE)
    ours, expected = _converted(x, dtype), x.to(dtype)
    nan = expected.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reciprocal(x_ptr, y_ptr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(y_ptr + i, numerics.reciprocal(tl.load(x_ptr + i)))


def test_reciprocal() -> None:
    x = 1 + torch.logspace(-6, 30, 100, dtype=torch.float64, device=DEVICE)
    y = torch.empty_like(x)
    _reciprocal[(100,)](x, y)
    torch.testing.assert_close(y, 1 / x, rtol=4e-16, atol=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _complement(x_ptr, y_ptr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(y_ptr + i, numerics.one_minus_exp2(tl.load(x_ptr + i), DTYPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bias_corrections(dtype: torch.dtype) -> None:
    """1 - beta^t without the cancellation of torch's, from the first step to the millionth."""
    steps = torch.tensor([1, 2, 3, 7, 10, 69, 70, 100, 693, 694, 1000, 10**4, 10**6])
    log2 = torch.tensor([0.0, 0.5, 0.9, 0.999, 0.99999], dtype=torch.float64).log2()
    x = (log2[:, None] * steps).flatten().to(DEVICE)
    y = torch.empty_like(x, dtype=dtype)
    _complement[(len(x),)](x, y, getattr(tl, str(dtype).removeprefix("torch.")))
    exact = -np.expm1(x.cpu().numpy().astype(np.longdouble) * np.log(np.longdouble(2)))
    error = np.abs(y.cpu().numpy().astype(np.longdouble) / exact - 1).max()
    assert error < (4 if dtype == torch.float32 else 16) * torch.finfo(dtype).eps
