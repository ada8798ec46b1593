"""Our optimizer and torch's, led through the same program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import BLOCK, SCALARS, Case, Spec, Tensors
from torch.nn import Parameter

SPECS = (
    Spec("a", lambda draw: draw(5)),
    Spec("b", lambda draw: draw(BLOCK + 1)),
    Spec("c", lambda draw: draw(3, 4)),
    Spec("d", lambda draw: draw()),
)


class Pair:
    """Our optimizer and torch's, led through the same program in float64."""

    def __init__(self, case: Case, groups: Callable[[list[Parameter]], Any] = list) -> None:
        self.case = case
        self.tensors = (Tensors(torch.float64, specs=SPECS), Tensors(torch.float64, specs=SPECS))
        ours, theirs = (tensors.params for tensors in self.tensors)
        self.optimizers = [case.ours(groups(ours)), case.theirs(groups(theirs))]

    def each(self, change: Callable[[torch.optim.Optimizer, list[Parameter]], object]) -> None:
        for optimizer, tensors in zip(self.optimizers, self.tensors, strict=True):
            change(optimizer, tensors.params)

    def step(self, times: int = 1, without: tuple[int, ...] = ()) -> None:
        """Step with new gradients, but none for some parameters; then compare everything."""
        for _ in range(times):
            for optimizer, tensors in zip(self.optimizers, self.tensors, strict=True):
                tensors.new_gradients()
                for i in without:
                    tensors.params[i].grad = None
                optimizer.step()
            self.check()

    def check(self) -> None:
        ours, theirs = self.optimizers
        for p, q in zip(*(tensors.params for tensors in self.tensors), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            assert (p in ours.state) == (q in theirs.state)
            assert list(ours.state.get(p, {})) == list(theirs.state.get(q, {}))
            for key, value in ours.state.get(p, {}).items():
                expected = theirs.state[q][key]
                assert value.device == expected.device or key in SCALARS  # torch's ASGD: on the GPU
                torch.testing.assert_close(
                    value, expected, rtol=1e-12, atol=1e-12, check_device=False
                )


def two_groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.003, "weight_decay": 0.1}]
