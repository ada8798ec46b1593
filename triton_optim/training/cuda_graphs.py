"""A step captured in a CUDA graph."""

from __future__ import annotations

from itertools import chain

import torch

from ..launch import backend
from ..optimizer import FusedOptimizer
from ..step.plan import UNWATCHED, not_identical
from ..tensors.sharding import local


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

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        view = optimizer._fused_view()
        param = next(iter(view.params))
        if local(param).device.type not in backend.CAPTURABLE_DEVICE_TYPES:
            raise RuntimeError(
                f"parameters are on {local(param).device}, where there are no CUDA graphs; call "
                "step()"
            )
        self._graph = torch.cuda.CUDAGraph()
        view.drop_stale_remainders()
        with backend.current(local(param).device), torch.cuda.graph(self._graph):
            optimizer.step()
        stepper = optimizer._stepper
        assert stepper.plan is not None
        self._plan, self._options = stepper.plan, stepper.options
        self._addresses = self._gradients()
        self._values = [
            {name: _contents(group[name]) for name in group.keys() - UNWATCHED}
            for group in optimizer.param_groups
        ]

    def __call__(self) -> None:
        """Replay the step.

        Raises:
            RuntimeError: a tensor is not where it was captured, or a value in the groups was
                replaced, also within a list. Nothing has been replayed then.
        """
        plan, stepper, view = self._plan, self._optimizer._stepper, self._optimizer._fused_view()
        replaced = (
            name
            for group, values in zip(view.groups, self._values, strict=False)
            for name, contents in values.items()
            if not_identical(_contents(group.get(name)), contents)
        )
        if stepper.options is not self._options or any(replaced):
            raise RuntimeError(
                "a value in the parameter groups or max_grad_norm was replaced, which a replay "
                "would not see; fill a rate in place, as torch's schedulers do, or make a new "
                "GraphedStep"
            )
        inputs = plan.read(view) if stepper.plan is plan else None
        if inputs is None or self._gradients() != self._addresses:
            raise RuntimeError(
                "a parameter, its gradient or its state is not where the graph was captured, so "
                "that a replay would use stale memory; keep gradients in place with "
                "zero_grad(set_to_none=False), or make a new GraphedStep"
            )
        launch_groups = [*zip(plan.launch_groups, inputs, strict=True)]
        for group, tensors in launch_groups:
            group.drop_stale(tensors)
        self._graph.replay()
        for group, tensors in launch_groups:
            group.bump_versions(tensors)

    def _gradients(self) -> list[int]:
        """Their addresses; 0 of one that is missing."""
        grads = (param.grad for param in self._optimizer._fused_view().params)
        return [0 if grad is None else local(grad).data_ptr() for grad in grads]


def _contents(value: object) -> list[object]:
    """The value, or those in a list or tuple: a list can change while it is the same object."""
    if isinstance(value, list | tuple):
        return [*chain.from_iterable(map(_contents, value))]
    return [value]
