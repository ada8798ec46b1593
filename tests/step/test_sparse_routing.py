"""Which route a sparse gradient takes, and what a plan of it notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BLOCK, DEVICE, TORCH, new_param, two_copies
from embedding_tables import ADAGRAD, Tables, sparse, worst
from guarded_memory import guarded
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend
from triton_optim.launch.variant import Variant
from triton_optim.step import routing


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_beside_dense_ones(name: str, launches: list[Variant]) -> None:
    kwargs: dict[str, Any] = {"lr": 0.1}
    embeddings = [torch.nn.Embedding(10, 3, sparse=True, device=DEVICE) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    dense = two_copies(new_param(BLOCK + 1))
    ours, theirs = (
        getattr(module, name)([*embedding.parameters(), param], **kwargs)
        for module, embedding, param in zip(
            (triton_optim, torch.optim), embeddings, dense, strict=True
        )
    )
    for _ in range(3):
        for embedding, optimizer in zip(embeddings, (ours, theirs), strict=True):
            embedding.zero_grad()
            embedding(torch.tensor([1, 2, 2, 7], device=DEVICE)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(embeddings[0].weight, embeddings[1].weight)
    torch.testing.assert_close(*dense)
    assert len(launches) == 3
    assert [float(s["step"]) for s in ours.state.values() if "step" in s] == (
        [3.0, 3.0] if name == "Adagrad" else []
    )


def test_sparse_gradients_on_rdna(monkeypatch: pytest.MonkeyPatch) -> None:
    """No order among what a program stores there: only dense gradients have a kernel."""
    dense, sparse = new_param(4, 3), new_param(4, 3)
    sparse.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 3), (4, 3), device=DEVICE
    )
    monkeypatch.setattr(backend, "COMPILED", True)
    for architecture, reason in (
        ("gfx942", None),
        ("sm_90", None),
        ("gfx1100", "its gradient is sparse, on gfx1100"),
    ):
        monkeypatch.setattr(backend, "architecture", lambda _, name=architecture: name)
        assert routing.tensors_unsupported(sparse, sparse.grad, row_wise=True) == reason
        assert dense.grad is not None
        assert routing.tensors_unsupported(dense, dense.grad, row_wise=True) is None


def test_a_sparse_gradient_that_becomes_dense(launches: list[Variant]) -> None:
    p, q = two_copies(new_param(4, 3))
    ours, theirs = triton_optim.Adagrad([p]), torch.optim.Adagrad([q])
    for is_sparse in (True, True, False, False, True, False):
        for param, optimizer in ((p, ours), (q, theirs)):
            grad = torch.ones_like(param).detach()
            param.grad = grad.to_sparse(1) if is_sparse else grad
            optimizer.step()
        torch.testing.assert_close(p, q)
    assert len(launches) == 3


@pytest.mark.parametrize("kind", ["expanded", "strided", "misaligned", "int32 ids", "other dtype"])
def test_values_in_other_layouts(kind: str) -> None:
    tables = Tables([(12, 4)], torch.float32)
    (param,) = tables.params
    twin = Parameter(param.detach().clone())
    if kind == "other dtype" and TORCH < (2, 9):
        pytest.skip("torch takes no such gradient")
    ids = torch.tensor([3, 5, 3, 0, 3])
    values = {
        "expanded": tables.draw(1, 1).expand(5, 4),
        "strided": tables.draw(4, 5).t(),
        "misaligned": guarded(tables.draw(5, 4), 1),
        "int32 ids": tables.draw(5, 4),
        "other dtype": tables.draw(5, 4),
    }[kind]
    for p in (param, twin):
        p.grad = sparse(ids.int() if kind == "int32 ids" else ids, values, param)
    if kind == "other dtype":
        param.grad_dtype = None  # as the parameter's, torch says otherwise
        param.grad = sparse(ids, values.bfloat16(), param)
        twin.grad = sparse(ids, values.bfloat16().float(), param)
    ours, theirs = ADAGRAD.ours([param], fused=True), ADAGRAD.theirs([twin])
    for _ in range(2):
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["param", "state", "gap in state", "sparse dims"])
def test_a_plan_notices_what_changes(change: str) -> None:
    runs = [Tables([(12, 4)]), Tables([(12, 4)])]
    optimizers = [ADAGRAD.ours(runs[0].params), ADAGRAD.theirs(runs[1].params)]
    for step in range(4):
        for run, optimizer in zip(runs, optimizers, strict=True):
            (param,) = run.params
            run.new_gradients([9])
            assert param.grad is not None
            if step == 2 and change == "param":
                param.data = param.data.clone()
            elif step == 2 and change == "state":
                optimizer.state[param]["sum"] = optimizer.state[param]["sum"].clone()
            elif step == 2 and change == "gap in state":
                sum_ = optimizer.state[param]["sum"]
                optimizer.state[param]["sum"] = torch.cat((sum_, sum_), 1)[:, :4]
            elif step == 2 and change == "sparse dims":
                param.grad = param.grad.to_dense().to_sparse(2)
            optimizer.step()
        assert worst(runs[0].params, runs[1].params) < 1e-12
