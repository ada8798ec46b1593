"""How results are compared: errors, bits, and what an exception leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import SPECS, Spec
from torch import Tensor
from torch.optim import Optimizer


def largest(tensor: Tensor) -> float:
    """The largest magnitude; 0 of an empty tensor, infinite of NaN."""
    value = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
    return value if value == value else float("inf")


def assert_no_worse(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    exact: Sequence[Tensor],
    label: str,
    units: int = 1,
    specs: Sequence[Spec] = SPECS,
) -> None:
    """Tensor by tensor, the largest error of `ours` is no larger than that of `theirs`.

    But for `units` in the last place of the largest value among them.
    """
    info = torch.finfo(theirs[0].dtype)
    unit = units * info.eps * max(info.smallest_normal, *map(largest, exact))
    for spec, p, q, e in zip(specs, ours, theirs, exact, strict=True):
        error, torch_error = largest(p.to(e.dtype) - e), largest(q.to(e.dtype) - e)
        message = f"{label} of {spec.name}: {error:.3e}, torch {torch_error:.3e}, unit {unit:.3e}"
        assert error <= torch_error + unit, message


def updates_among(launches: Sequence[Any]) -> list[Any]:
    """Without those that count steps, as `fused=True` does on a GPU."""
    return [launch for launch in launches if launch.name != "count_kernel"]


def assert_same_bits(a: Any, b: Any) -> None:
    """Two nested structures of tensors and values are equal to the bit, NaN included.

    On the same device, but for numbers: counters lie where what counts them is.
    """
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.device == b.device or a.dim() == 0
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_device=False)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


@contextmanager
def raises(message: str, optimizer: Optimizer, tensors: Sequence[Tensor]) -> Iterator[None]:
    """What is done inside raises, and leaves these tensors and the optimizer to the bit."""

    def state() -> list[Any]:
        return copy.deepcopy([[t.detach() for t in tensors], dict(optimizer.state_dict())])

    before = state()
    with pytest.raises(RuntimeError, match=message):
        yield
    assert_same_bits(state(), before)
