"""Training with sparse gradients: `GradScaler`, embeddings and bags, steps in backward."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_same_bits
from cases import DEVICE, Case, grad_of
from embedding_tables import ADAGRAD, every_sparse_case, launches_of
from torch import Tensor, nn
from torch.nn import Parameter

import triton_optim


@every_sparse_case
@pytest.mark.parametrize("factors", [(1, math.inf, 1), (math.inf, 1, 1)], ids=str)
def test_grad_scaler(case: Case, factors: tuple[float, ...]) -> None:
    """Unscaled and skipped in the kernel; state and gradients as torch's."""
    weights = [Parameter(torch.linspace(-1, 1, 36, device=DEVICE).view(12, 3)) for _ in range(2)]
    optimizers = [case.ours([weights[0]], fused=True), case.theirs([weights[1]])]
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=2) for _ in range(2)]
    ids = torch.tensor([3, 5, 3, 0, 11], device=DEVICE)
    for factor in factors:
        grads = []
        for weight, optimizer, scaler in zip(weights, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            rows_ = nn.functional.embedding(ids, weight, sparse=True)
            scaler.scale((rows_ * rows_ * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            grads.append(grad_of(weight).to_dense())
        torch.testing.assert_close(weights[0], weights[1])
        if factor == 1:
            torch.testing.assert_close(*grads)
    assert_same_bits(scalers[0].state_dict(), scalers[1].state_dict())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states, check_device=False)


def test_embeddings_and_bags_train_as_torchs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 8, sparse=True, padding_idx=0)
            self.bag = nn.EmbeddingBag(40, 8, sparse=True, mode="mean")
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.words(ids % 30).sum(1) + self.bag(ids))
            return out

    models = [Model().double().to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [ADAGRAD.ours(models[0].parameters()), ADAGRAD.theirs(models[1].parameters())]
    for step in range(5):
        ids = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            launches = launches_of(optimizer)
            if model is models[0]:
                assert sorted(launch.name for launch in launches) == [
                    "keys_kernel",
                    "multi_tensor_kernel",
                    "rows_kernel",
                ]
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_in_backward() -> None:
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Linear(8, 2)).to(DEVICE)
        optimizer = ADAGRAD.ours(model.parameters())
        if inside:
            triton_optim.step_in_backward(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.arange(step, step + 9, device=DEVICE) % 5).square().sum().backward()
            optimizer.step()
        results.append([*map(Tensor.detach, model.parameters()), optimizer.state_dict()])
    assert_same_bits(results[1], results[0])
