"""Memory that must not be touched: a pattern on both sides of every tensor of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MARGIN = 512  # bytes on either side, a multiple of every alignment that matters
PATTERN = 0xA5
ALLOCATIONS = ("empty_like", "zeros_like", "ones_like", "full_like", "randn_like")


class GuardedBuffer(NamedTuple):
    """Bytes of a buffer, of which those from `start` to `stop` are a tensor's."""

    memory: Tensor
    start: int
    stop: int

    def is_whole(self) -> bool:
        margins = (self.memory[: self.start], self.memory[self.stop :])
        return all(bool((margin == PATTERN).all()) for margin in margins)


guarded_buffers: list[GuardedBuffer] = []


def guarded(tensor: Tensor, offset: int = 0) -> Tensor:
    """A copy of `tensor`, strides and all, inside a larger buffer.

    Args:
        tensor: what has no dense memory of its own comes back as it is.
        offset: elements by which its address misses a multiple of 64 bytes.
    """
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and reach + 1 != tensor.numel():
        return tensor
    size = tensor.element_size()
    start = MARGIN + offset * size
    stop = start + tensor.numel() * size
    memory = torch.full((stop + MARGIN,), PATTERN, dtype=torch.uint8, device=tensor.device)
    guarded_buffers.append(GuardedBuffer(memory, start, stop))
    inside = memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), start // size)
    return inside.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def guarding(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An allocation of torch's, untraced by Dynamo, whose tensors lie between guard bytes."""

    def allocation(*args: Any, **kwargs: Any) -> Tensor:
        return guarded(allocate(*args, **kwargs))

    untraced: Callable[..., Tensor] = torch.compiler.disable(allocation)
    return untraced


def pop_damaged() -> list[GuardedBuffer]:
    """Forget all guarded buffers. Returns those whose guard bytes were written."""
    damaged = [buffer for buffer in guarded_buffers if not buffer.is_whole()]
    guarded_buffers.clear()
    return damaged
