"""What stands in for the GPU that perf/lab/device.py describes."""

from __future__ import annotations

import torch
from cases import DEVICE
from lab.device import Host
from lab.implementations import Step


class FakeDevice(Host):
    """Stands in for a GPU: its moments are those of the host's clock."""

    type = DEVICE
    is_gpu = True

    def __init__(self, free: int = 1 << 20) -> None:
        self.name = "No GPU (2)"
        self.l2_bytes = 1 << 10
        self.peak_bandwidth = 4e12
        self.copied = torch.randn(1 << 16, device=DEVICE)
        self._source, self._target = self.copied.chunk(2)
        self._reader = self._source[:64]
        self._free = free

    def driver(self) -> str:
        return "none"

    def hold(self, microseconds: float) -> None:
        assert 0 < microseconds <= 200_000

    def free_bytes(self) -> int:
        return self._free

    def peak_of(self, step: Step) -> int:
        step()
        return 0

    def launches(self, step: Step) -> int:
        step()
        return 1
