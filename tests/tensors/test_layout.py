"""Where a tensor's elements lie, and what watches it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from triton_optim.tensors import layout


@pytest.mark.parametrize("private", [True, False])
def test_layout_guard(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's private guard, and the public one that stands in where it is missing."""
    if private:
        assert vars(layout)["TensorGuards"] is not None
    else:
        monkeypatch.setattr(layout, "TensorGuards", None)
    tensors = [torch.randn(4, 8), torch.randn(()), torch.randn(2, 3, 4, 5)]
    layouts = [*map(layout.Layout.of, tensors)]
    guard = layout.LayoutGuard(layouts, [(0, 1), (2,)])
    same = [torch.zeros_like(t) for t in tensors]
    assert guard.check(same)
    assert guard.check_rows(same, b"\1\1")
    first = tensors[0]
    for other in (
        None,
        torch.randn(8, 4).t(),
        first[:3],
        first[:, :7],
        first.bfloat16(),
        first.double(),
        first.to("meta"),
        first.to_sparse(),
        first.to(torch.complex64).conj(),
        Parameter(first),
    ):
        assert not guard.check([other, *tensors[1:]])
        assert not guard.check_rows([other, *tensors[1:]], b"\1\1")
        assert guard.check_rows([other, *tensors[1:]], b"\0\1")


def test_is_dense() -> None:
    base = torch.zeros(4, 6, 5)
    for tensor, dense in (
        (base, True),
        (base.permute(2, 0, 1), True),
        (base[1:2].transpose(0, 2), True),
        (base[:, ::2], False),
        (base[:, :, :1].expand(4, 6, 5), False),
        (base[:0], True),
        (torch.zeros(()), True),
    ):
        assert layout.is_non_overlapping_and_dense(tensor) == dense
