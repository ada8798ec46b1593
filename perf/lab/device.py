"""Where steps are timed: a GPU's clock, queue, caches and memory, or the CPU in its place."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lab.gpus import peak_bandwidth
from lab.implementations import Step
from lab.machine import printed

COPY_BYTES = 1 << 30  # of the buffer whose copy measures bandwidth: far larger than any L2
EMPTIED_BELOW = 4  # times the L2 that a step moves: below that, the L2 is emptied before each step
CALIBRATION = 1_000_000  # cycles


class Device:
    """The first GPU: its clock, caches and memory.

    A class of its own so that what measures can run without a GPU, with another in its place.

    Attributes:
        peak_bandwidth: bytes/s, or None where it is not known.
        copied: the memory between whose halves `copy` copies.
    """

    type = "cuda"
    is_gpu = True

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name: str = properties.name
        self.l2_bytes: int = properties.L2_cache_size
        # Not in older torch; a clock of AMD's says nothing of the transfers a cycle.
        known = () if torch.version.hip else ("memory_clock_rate", "memory_bus_width")
        self.peak_bandwidth = peak_bandwidth(
            properties.name, *(getattr(properties, name, 0) for name in known)
        )
        self.copied = torch.empty(2 * COPY_BYTES // 4, device=self.type).normal_()
        self._source, self._target = self.copied.chunk(2)
        self._reader = self._source[: EMPTIED_BELOW * self.l2_bytes // 4]
        self._cycles_per_us = CALIBRATION / self._sleep_us(CALIBRATION)

    def _sleep_us(self, cycles: int) -> float:
        for _ in range(200):  # about 0.1 s, in which an idle GPU raises its clock
            self.copy()
        start = self.mark()
        torch.cuda._sleep(cycles)
        stop = self.mark()
        self.synchronize()
        return self.between(start, stop)

    def driver(self) -> str:
        """The driver's version, as nvidia-smi tells it."""
        query = "--query-gpu=driver_version"
        return printed("nvidia-smi", query, "--format=csv,noheader").split(";")[0]

    def mark(self) -> Any:
        """A moment in the device's queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Microseconds between two moments; both have passed."""
        return 1e3 * float(start.elapsed_time(stop))

    def passed(self, moment: Any) -> bool:
        return bool(moment.query())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def hold(self, microseconds: float) -> None:
        """Keep the device busy, so that what is queued meanwhile then runs without gaps."""
        torch.cuda._sleep(int(microseconds * self._cycles_per_us))

    def may_cache(self, step_bytes: int) -> bool:
        """Whether a step of so many bytes could find some in the L2, from the one before."""
        return step_bytes < EMPTIED_BELOW * self.l2_bytes

    def empty_l2(self) -> None:
        """Read so much that nothing of a step is left in the L2, and nothing has to be written."""
        self._reader.sum()

    def copy(self) -> None:
        self._target.copy_(self._source)

    def free_bytes(self) -> int:
        """Free memory, after giving back all that nobody uses any more."""
        torch._dynamo.reset()  # compiled steps keep their tensors
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def allocated(self) -> int:
        """Bytes of tensors that somebody still uses."""
        gc.collect()
        return torch.cuda.memory_allocated()

    def peak_of(self, step: Step) -> int | None:
        """Bytes that a step allocates beyond what is there before it."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = self.allocated()
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, step: Step) -> int | None:
        """Kernels of a step, not copies and fills; None where the profiler saw nothing."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            # The profiler can lose what runs first, and a first step sets things up.
            for _ in range(3):
                torch.cuda._sleep(1)
                step()
            torch.cuda._sleep(1)
            self.synchronize()
        kernels = sorted(
            (event.time_range.start, event.name)
            for event in profiler.events()
            if event.device_type.name == "CUDA"
            and not event.is_user_annotation
            and not event.name.startswith(("Memcpy", "Memset"))
        )
        names = [name for _, name in kernels]
        markers = [i for i, name in enumerate(names) if "spin_kernel" in name]
        return markers[-1] - markers[-2] - 1 if len(markers) > 1 else None


class Host(Device):
    """This CPU. Its moments are those of the host's clock.

    Args:
        memory: bytes that the process may take.
    """

    type = "cpu"
    is_gpu = False

    def __init__(self, memory: int) -> None:
        self.name = "none"
        self.l2_bytes = 0
        self.peak_bandwidth: float | None = None
        self._memory = memory

    def driver(self) -> str:
        return ""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, stop: float) -> float:
        return 1e6 * (stop - start)

    def passed(self, moment: float) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def hold(self, microseconds: float) -> None:
        pass

    def free_bytes(self) -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident
        return self._memory - pages * os.sysconf("SC_PAGE_SIZE")

    def allocated(self) -> int:
        return 0

    def peak_of(self, step: Step) -> int | None:
        return None

    def launches(self, step: Step) -> int | None:
        return None
