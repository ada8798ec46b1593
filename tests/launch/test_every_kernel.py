"""A step with a kernel of every kind, as compiled: what an older Triton may not compile.

CI runs it with the oldest Triton that is supported; see `.ci/run`.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cases import CASES, Case, each, scaled_step
from torch.nn import Embedding, Parameter

import triton_optim

pytestmark = pytest.mark.ptx

MOST = ("-all", "-momentum", "-initial", "-weight_decay")  # flags of the kernels
# Of which no state may have 8 bits, or which have none.
WITHOUT_8_BITS = ("asgd-all", "rprop-all", "rmsprop-all", "adamw-all", "sgd-weight_decay")
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "exact": {"master_weight_bits": 32},
    "stochastic": {"stochastic_rounding": True},
    "8bit": {"master_weight_bits": 32, "state_dtype": "8bit"},
}


@pytest.mark.parametrize(
    ("case", "stored"),
    [
        (case, stored)
        for case, stored in product(CASES, FORMATS)
        if case.name.endswith(MOST) and (stored != "8bit" or case.name not in WITHOUT_8_BITS)
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_dense(case: Case, stored: str) -> None:
    """Within a unit of bfloat16, or of float32, from torch's step."""
    dtype = torch.float32 if stored == "float32" else torch.bfloat16
    start = torch.linspace(-2, 2, 9).to(dtype)
    ours, theirs = Parameter(start.clone()), Parameter(start.to(torch.float32, copy=True))
    optimizer, reference = case.ours([ours], **FORMATS[stored]), case.theirs([theirs])
    ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
    optimizer.step()
    reference.step()
    assert not torch.equal(ours.detach(), start)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.float(), theirs, rtol=unit, atol=unit / 8)


@each([case for case in CASES if case.name in ("adamw-all", "rmsprop-all", "nadam")])
def test_unscaled_clipped_and_counted_on_the_device(case: Case) -> None:
    params = [Parameter(torch.ones(5)) for _ in range(2)]
    ours = case.ours(params[:1], max_grad_norm=1.0, skip_nonfinite=True)
    theirs = case.theirs(params[1:])
    for param in params:
        param.grad = torch.arange(5.0)
    torch.nn.utils.clip_grad_norm_(params[1:], 1.0)
    params[0].grad = 8 * torch.arange(5.0)
    scaled_step(ours, 0.0, 8.0)
    theirs.step()
    torch.testing.assert_close(*params)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SGD", {"lr": 0.1}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.5}),
        ("RMSprop", {"lr": 0.1, "sparse": "lazy", "centered": True}),
        ("RowwiseAdagrad", {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("width", [4, 5])
def test_rows(name: str, kwargs: dict[str, Any], width: int) -> None:
    """Those of a sparse gradient, some of them twice, as a dense gradient steps them."""
    tables = [Embedding(9, width, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    for table in tables:
        optimizer = getattr(triton_optim, name)(table.parameters(), **kwargs)
        table(torch.tensor([1, 3, 1, 7])).square().sum().backward()
        optimizer.step()
    rows = torch.tensor([1, 3, 7])
    torch.testing.assert_close(tables[0].weight[rows], tables[1].weight[rows])
