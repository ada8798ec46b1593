"""A copy that reads and writes what a step does: the bandwidth that its mix of streams allows."""

from __future__ import annotations

import torch
from torch import Tensor

from lab.copy_kernel import mixed_copy_kernel
from lab.device import Device
from lab.rules import Rule, Storage, bytes_per_param

# Block sizes, and warps of a program: at least 8 elements a thread, a whole vector of 16 bits each.
# The fastest is taken.
CONFIGS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
TRIALS = 5  # of each


class MixedCopy:
    """The streams of a step, each in one piece, and updated in place.

    Args:
        memory: whose values are lost. So many bytes are loaded and stored together.
        rule: whose state counts.
        storage: the dtypes.

    Attributes:
        n_bytes: that a run loads and stores.
    """

    def __init__(self, memory: Tensor, rule: Rule, storage: Storage) -> None:
        moved = bytes_per_param(rule, storage)
        multiple = max(size for size, _ in CONFIGS)
        numel = memory.nbytes // moved // multiple * multiple
        self.n_bytes = numel * moved
        sizes = [numel * storage.param.itemsize] * 2
        sizes.append(len(rule.states) * numel * storage.state.itemsize)
        param, grad, states = memory.view(torch.uint8)[: sum(sizes)].split(sizes)
        self.param, self.grad = param.view(storage.param), grad.view(storage.param)
        self.states = states.view(storage.state).view(-1, numel) if rule.states else None
        for stream in self.streams:
            stream.normal_()
        self.config = CONFIGS[0]

    @property
    def streams(self) -> list[Tensor]:
        """All that is read: parameter, gradient and, one after another in one tensor, states."""
        return [self.param, self.grad, *([] if self.states is None else [self.states])]

    def run(self) -> None:
        block_size, num_warps = self.config
        numel = self.param.numel()
        n_states = 0 if self.states is None else len(self.states)
        mixed_copy_kernel[(numel // block_size,)](
            self.param,
            self.grad,
            self.states,
            numel,
            N_STATES=n_states,
            BLOCK_SIZE=block_size,
            num_warps=num_warps,
        )

    def tune(self, device: Device) -> None:
        """Take the fastest config on this device."""
        times = {config: self._trial(device, config) for config in CONFIGS}
        self.config = min(times, key=times.__getitem__)

    def _trial(self, device: Device, config: tuple[int, int]) -> float:
        self.config = config
        self.run()  # compiled here
        start = device.mark()
        for _ in range(TRIALS):
            self.run()
        stop = device.mark()
        device.synchronize()
        return device.between(start, stop)
