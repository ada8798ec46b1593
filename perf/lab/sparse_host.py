"""The CPU in the GPU's place, and the host time of steps whose kernels nothing launches."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lab.device import Device
from lab.dry_gpu import dry_gpu
from lab.implementations import OURS
from lab.sparse_implementations import IMPLEMENTATIONS, TORCH_SPARSE, Implementation
from lab.sparse_work import BATCHES, Candidate, Embeddings, Shape
from lab.timing import Summary
from triton_optim.launch.launcher import record_launches

GIB = 1 << 30
DRY_BATCH = 32  # ids a table: so few that torch's times are its host's
DRY_ROWS, DRY_DIM = 1000, 16
DRY_REPEATS = 50
DRY_TABLES = (1, 26)  # 26 are DLRM's


class Host(Device):
    """This CPU. Its moments are those of the host's clock.

    Args:
        memory: bytes that the process may take.
    """

    type = "cpu"

    def __init__(self, memory: int) -> None:
        self.name = "none"
        self.l2_bytes = 0
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


def dry_shape(tables: int) -> Shape:
    return Shape(DRY_ROWS, DRY_DIM, DRY_BATCH, "uniform", tables)


def dry_times(
    shape: Shape, rules: Collection[str]
) -> Iterator[tuple[Implementation, Summary | str]]:
    """Host time of our steps, and of torch's over so few ids that arithmetic hardly counts.

    Kernels are compiled for sm_90, and a launcher that does nothing gets them. What torch does
    between them, such as the sort, the CPU does. Every step gets another gradient.

    Yields:
        Microseconds, or why there are none.
    """
    chosen = [item for item in IMPLEMENTATIONS if item.rule.name in rules]
    chosen = [item for item in chosen if item.name in (OURS, TORCH_SPARSE)]
    candidates: dict[str, Candidate] = {}
    with dry_gpu(), _one_thread():
        work = Embeddings(shape, Host.type)
        for item in chosen:
            try:
                candidate = item.build(work)
                candidate.load(0)
                with record_launches() as launches:
                    candidate.step()
            except Exception as error:
                yield item, f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if item.name == OURS and not launches:
                yield item, "no kernel took these gradients"
            else:
                candidates[item.key] = candidate
        times: dict[str, list[float]] = {key: [] for key in candidates}
        for repeat in range(DRY_REPEATS):
            for key, candidate in candidates.items():
                candidate.load(repeat % BATCHES)
                start = time.perf_counter()
                candidate.step()
                times[key].append(1e6 * (time.perf_counter() - start))
    for item in chosen:
        if item.key in times:
            yield item, Summary.of(times[item.key])


@contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
