"""A step captured in a CUDA graph."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from .columns import addresses_of
from .fused import FusedStep
from .plan import differ
from .shards import local


class GraphedStep:
    """An optimizer's step captured in a CUDA graph, to be called instead of `step()`.

    It has captured the addresses of gradients, and everything in the groups that is no tensor.
    A call compares them and replays: one launch from the host.

    Args:
        optimizer: made with `capturable=True` and with rates that are tensors on the GPU. It has
            made a step, and its parameters have the gradients that later ones will overwrite.

    Raises:
        RuntimeError: the optimizer cannot be captured, and why.

    Example:
        >>> lr = torch.tensor(1e-3, device="cuda")
        >>> optimizer = RMSprop(model.parameters(), lr=lr, capturable=True)
        >>> loss(model, batch).backward()
        >>> optimizer.step()
        >>> step = GraphedStep(optimizer)
        >>> for batch in loader:
        ...     optimizer.zero_grad(set_to_none=False)
        ...     loss(model, batch).backward()
        ...     step()
        ...     scheduler.step()
    """

    def __init__(self, optimizer: FusedStep) -> None:
        self._optimizer = optimizer
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            optimizer.step()
        assert optimizer._plan is not None
        self._plan = optimizer._plan
        self._params = [p for p in self._plan.params if p.grad is not None]
        self._addresses = self._touched()
        self._values = self._plan.group_values(optimizer)

    def __call__(self) -> None:
        """Replay the step.

        Raises:
            RuntimeError: a parameter or a gradient is no longer where it was captured, or a value
                in the groups was replaced. Nothing has been replayed then.
        """
        if self._touched() != self._addresses:
            raise RuntimeError(
                "a parameter or its gradient is not where the graph was captured, so that a replay "
                "would use stale memory; keep gradients in place with "
                "zero_grad(set_to_none=False), or make a new GraphedStep"
            )
        if differ(self._plan.group_values(self._optimizer), self._values):
            raise RuntimeError(
                "a value in the parameter groups was replaced, which a replay would not see; fill "
                "a rate in place, as torch's schedulers do, or make a new GraphedStep"
            )
        self._graph.replay()
        increment_version(self._params)

    def _touched(self) -> list[int]:
        """Addresses of parameters and their gradients; 0 of a gradient that is missing."""
        grads = (param.grad for param in self._params)
        addresses = [0 if grad is None else local(grad).data_ptr() for grad in grads]
        return [*addresses_of(map(local, self._params)), *addresses]
