"""Embedding tables and their sparse gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from assertions import largest
from cases import DEVICE, Case, each, grad_of
from guarded_memory import guarded
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import Launch, record_launches

SPARSE_CASES = (
    Case("sgd", "SGD", {"lr": 0.1}),
    Case("sgd-maximize", "SGD", {"lr": 0.1, "maximize": True}),
    Case("adagrad", "Adagrad", {"lr": 0.1}),
    Case("adagrad-lr_decay", "Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    Case("adagrad-initial", "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    Case("adagrad-maximize", "Adagrad", {"lr": 0.1, "maximize": True}),
)
ADAGRAD = SPARSE_CASES[2]
every_sparse_case = each(SPARSE_CASES)


class Tables:
    """Tables whose values and gradients `storage` holds exactly, kept in `dtype`.

    Two with one seed and one storage have the same values, whatever their `dtype`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        storage: torch.dtype = torch.float64,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._storage, self._dtype = storage, dtype or storage
        # torch adds a sparse vector elsewhere if the parameter does not start its memory.
        drawn = [(self.draw(*shape), shape) for shape in shapes]
        self.params = [Parameter(t.clone() if len(shape) == 1 else t) for t, shape in drawn]

    def draw(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return guarded(values.to(self._storage).to(self._dtype).to(DEVICE))

    def new_gradients(self, counts: Sequence[int], hot: int = 0) -> None:
        """Uncoalesced ones of so many rows each, `hot` of them the same."""
        for param, count in zip(self.params, counts, strict=True):
            ids = torch.randint(param.shape[0], (count,), generator=self._generator)
            ids[: min(hot, count)] = param.shape[0] // 2
            ids = ids[torch.randperm(count, generator=self._generator)]
            param.grad = sparse(ids, self.draw(count, *param.shape[1:]), param)


def sparse(ids: Any, values: Tensor, param: Tensor) -> Tensor:
    """A sparse gradient, its ids and values between guard bytes."""
    ids = guarded(torch.as_tensor(ids, dtype=torch.int64).view(1, -1).to(DEVICE))
    return torch.sparse_coo_tensor(ids, values.to(DEVICE), param.shape, check_invariants=False)


def worst(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error."""
    return max(largest(t.double() - e) for t, e in zip(tensors, exact, strict=True))


def launches_of(optimizer: Any) -> list[Launch]:
    """Step, and return what was launched."""
    with record_launches() as launches:
        optimizer.step()
    return launches


def lazy_and_dense(
    centered: bool = False,
    shapes: tuple[tuple[int, ...], ...] = ((30, 4),),
    steps: int = 0,
    **kwargs: Any,
) -> tuple[list[Tables], list[Any]]:
    """RMSprop after so many steps: ours, lazy, and torch's, which is given dense gradients."""
    runs = [Tables(shapes), Tables(shapes)]
    kwargs = {"lr": 0.01, "centered": centered, **kwargs}
    ours = triton_optim.RMSprop(runs[0].params, sparse="lazy", **kwargs)
    optimizers = [ours, torch.optim.RMSprop(runs[1].params, foreach=False, **kwargs)]
    for _ in range(steps):
        step_both(runs, optimizers)
    return runs, optimizers


def step_both(runs: list[Tables], optimizers: list[Any], count: int = 5) -> None:
    for run, optimizer in zip(runs, optimizers, strict=True):
        run.new_gradients([count] * len(run.params))
        for param in run.params if run is runs[1] else []:
            param.grad = grad_of(param).to_dense()
        optimizer.step()


def check_both(runs: list[Tables], optimizers: list[Any]) -> None:
    assert worst(runs[0].params, runs[1].params) < 1e-12
    ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-12, atol=1e-12)
