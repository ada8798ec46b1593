"""What row-wise Adagrad does not take: a fallback without kernels, or an error before any write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import raises
from cases import DEVICE
from embedding_tables import sparse
from torch.nn import Parameter

from triton_optim import RowwiseAdagrad
from triton_optim.launch.launcher import record_launches


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(50, 16), r"has shape \(50, 16\), one number a row is \(50,\)"),
        (torch.ones(49), r"has shape \(49,\)"),
        (None, "is None"),
        (7.0, "is 7.0"),
    ],
)
def test_state_that_does_not_fit_raises(bad: object, message: str) -> None:
    param = Parameter(torch.ones(50, 16, device=DEVICE))
    optimizer = RowwiseAdagrad([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "sum": bad}
    with raises(f"state 'sum' of parameter 0 of group 0 {message}", optimizer, [param]):
        optimizer.load_state_dict(saved)
    optimizer.state[param]["sum"] = torch.ones(50, dtype=torch.float64, device=DEVICE)
    with raises("is torch.float64, not torch.float32", optimizer, [param]):
        optimizer.step()


@pytest.mark.parametrize("kind", ["wide", "transposed"])
def test_what_the_kernels_do_not_take_goes_without_them(kind: str) -> None:
    """And is refused under `fused=True`; a gradient laid out otherwise is no reason."""
    params = [Parameter(torch.ones(3, 4097 if kind == "wide" else 5, device=DEVICE))]
    if kind == "transposed":
        params = [Parameter(torch.ones(5, 3, device=DEVICE).t())]
    optimizer = RowwiseAdagrad(params, lr=0.1)
    params[0].grad = torch.full_like(params[0], 2.0)
    with record_launches() as launches:
        optimizer.step()
    assert not launches
    torch.testing.assert_close(params[0].detach(), torch.full_like(params[0], 0.9))
    with pytest.raises(RuntimeError, match="`fused=True` cannot be kept for parameter 0"):
        RowwiseAdagrad(params, fused=True).step()
    param = Parameter(torch.ones(3, 5, device=DEVICE))
    param.grad = torch.full((5, 3), 2.0, device=DEVICE).t()
    RowwiseAdagrad([param], lr=0.1, fused=True).step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, 0.9))


def test_rows_that_do_not_lie_one_after_another() -> None:
    """As of a convolution in channels_last, and gradients that have no rows."""
    weight = torch.randn(4, 3, 2, 2, device=DEVICE)
    params = [Parameter(weight.clone()) for _ in range(2)]
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    for param in params:
        param.grad = torch.ones_like(param)
        optimizer = RowwiseAdagrad([param], lr=0.1)
        optimizer.step()
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), params[1].detach())
    table = Parameter(torch.ones(3, 5, device=DEVICE))
    optimizer = RowwiseAdagrad([table])
    table.grad = torch.ones(3, 5, device=DEVICE).to_sparse(2)
    with raises("RowwiseAdagrad takes dense ones and", optimizer, [table]):
        optimizer.step()


def test_state_that_shares_memory_raises() -> None:
    param = Parameter(torch.ones(8, 2, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = RowwiseAdagrad([param])
    optimizer.step()
    optimizer.state[param]["sum"] = param.detach().flatten()[:8]
    with raises("share memory", optimizer, [param]):
        optimizer.step()


@pytest.mark.parametrize("name", ["lr", "weight_decay", "initial_accumulator_value", "eps"])
def test_negative_arguments_raise(name: str) -> None:
    kwargs: dict[str, Any] = {name: -1.0}
    with pytest.raises(ValueError, match=f"Invalid {name} value: -1.0"):
        RowwiseAdagrad([Parameter(torch.ones(2))], **kwargs)


def test_what_has_no_rows_of_real_numbers_raises() -> None:
    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = RowwiseAdagrad([param])
    with pytest.raises(ValueError, match="parameter 0 of the group is torch"):
        optimizer.add_param_group({"params": Parameter(torch.ones(2, dtype=torch.complex64))})
    assert len(optimizer.param_groups) == 1
    optimizer.max_grad_norm = 1.0
    param.grad = torch.ones_like(param)
    with raises("max_grad_norm", optimizer, [param]):
        optimizer.step()


def test_rows_that_are_not_there_raise_without_kernels_too() -> None:
    param = Parameter(torch.ones(3, 2))
    param.grad = sparse([0, 3], torch.ones(2, 2), param).cpu()
    optimizer = RowwiseAdagrad([param], fused=False)
    with raises("has a row 3, the parameter 3 rows", optimizer, [param]):
        optimizer.step()
