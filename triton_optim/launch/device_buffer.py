"""What changes from step to step, in one buffer on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, pointer_tables
from .pointer_tables import column

HEADER_FLOATS = 2  # float64 before the hyperparameters: the norm to clip to, and what aligns them


class Buffer:
    """Where gradients are, hyperparameters and step counts, sent in one copy when they did change.

    Args:
        device: where.
        n_grads: numbers that say where gradients are.
        n_hypers: hyperparameters of all groups.
        n_steps: step counts, or what a rule is given instead, if the host knows them and a kernel
            reads them.

    Attributes:
        memory: int64, all of it.
        grads: int64 [n_grads], padded.
        max_norm: float64 [].
        hypers: float64 [n_hypers].
        steps: float64 [n_steps], padded.
    """

    def __init__(self, device: torch.device, n_grads: int, n_hypers: int, n_steps: int) -> None:
        self._device = device
        lengths = [n + n % 2 for n in (n_grads, HEADER_FLOATS + n_hypers, n_steps)]
        self.memory = torch.empty(sum(lengths), dtype=torch.int64, device=device)
        self.grads, floats, steps = torch.split(self.memory, lengths)
        floats = floats.view(torch.float64)
        self.max_norm, self.hypers = floats[0], floats[HEADER_FLOATS : HEADER_FLOATS + n_hypers]
        self.steps = steps.view(torch.float64)
        self._sent: bytes | None = None
        self._captured: list[Tensor] = []
        self._hypers_sent: object = None
        self._max_norm = 0.0
        self._on_gpu: dict[int, Tensor] = {}

    def send(
        self,
        grads: bytes,
        hypers: list[float | Tensor],
        max_norm: float,
        steps: Sequence[float] = (),
    ) -> None:
        """Bring it up to date; a scalar that lives on a GPU is copied on the device."""
        if hypers is not self._hypers_sent or max_norm != self._max_norm:
            on_gpu = {i: h for i, h in enumerate(hypers) if isinstance(h, Tensor)}
            if on_gpu.keys() != self._on_gpu.keys():
                self._sent = None  # in these places stands what was copied on the device
            self._on_gpu = on_gpu
            floats = [0.0 if isinstance(h, Tensor) else h for h in hypers]
            self._float_column = column("d", [max_norm, 0.0, *floats])
            self._hypers_sent, self._max_norm = hypers, max_norm
        content = grads + self._float_column
        if steps:
            content += column("d", steps)
        if backend.is_capturing(self._device):
            self._capture(content)
        elif content != self._sent or self._captured:  # a replay sends what was captured
            host = pointer_tables.pin(pointer_tables.as_tensor(content), self._device)
            self.memory.copy_(host, non_blocking=True)
            self._sent = content
        for i, value in self._on_gpu.items():
            self.hypers[i].copy_(value.view(()), non_blocking=True)

    def _capture(self, content: bytes) -> None:
        """Let every replay send this content, which stays where the graph reads it."""
        host = pointer_tables.pin(pointer_tables.as_tensor(content), self._device)
        self._captured.append(host)
        self.memory.copy_(host, non_blocking=True)
