"""A model that steps in backward, and one that steps as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from assertions import assert_same_bits
from cases import CASES, DEVICE, Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_optim import step_in_backward

MOMENTUM = next(case for case in CASES if case.name == "sgd-dampening")


class Net(nn.Module):
    """Three blocks and a head, some of which a pass can leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)
        self.to(DEVICE)

    def forward(
        self, x: Tensor, *, head: bool = True, blocks: int = 3, reentrant: bool | None = None
    ) -> Tensor:
        for block in [*self.blocks][:blocks]:
            x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
            x = x.tanh()
        return self.head(x) if head else x


class PairedModels:
    """A model that steps in backward, and one that steps as ever."""

    def __init__(self, case: Case, model: Any = None, bucket_bytes: int = 200) -> None:
        first = model or Net()
        self.models: list[Any] = [first, copy.deepcopy(first)]
        self.optimizers = [case.ours(two_groups(model)) for model in self.models]
        self.handle = step_in_backward(first, self.optimizers[0], bucket_bytes=bucket_bytes)

    def each(self, change: Callable[[Any, torch.optim.Optimizer], object]) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            change(model, optimizer)

    def step(self, times: int = 1, **kwargs: Any) -> None:
        for _ in range(times):
            x = torch.randn(4, 6, device=DEVICE)
            for model in self.models:
                model(x.clone().requires_grad_(), **kwargs).square().sum().backward()
            self.check()

    def as_ever(self) -> None:
        """After `remove()`."""
        for model in self.models:
            model(torch.ones(4, 6, device=DEVICE)).sum().backward()
        assert all(param.grad is not None for param in self.models[0].parameters())
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        self.check()

    def check(self) -> None:
        self.optimizers[1].step()
        self.optimizers[1].zero_grad()
        ours, theirs = self.models
        assert all(param.grad is None for param in ours.parameters())
        assert_same_bits([*ours.parameters()], [*theirs.parameters()])
        assert_same_bits(*(optimizer.state_dict() for optimizer in self.optimizers))


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = [*model.named_parameters()]
    return [{"params": named[::3], "lr": 0.01}, {"params": named[1::3] + named[2::3]}]
