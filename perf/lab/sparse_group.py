"""What is measured together: one shape of embedding tables, by every implementation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

import torch

from lab.device import COPY_BYTES, Device
from lab.implementations import COPY, OURS, Step
from lab.rows import FAILED, NO_ROOM, NOT_AVAILABLE, OK, WRONG
from lab.sparse_host import Host
from lab.sparse_implementations import IMPLEMENTATIONS, Implementation, reference
from lab.sparse_rows import RIGHT, Row
from lab.sparse_work import BATCHES, Candidate, Embeddings, Shape, check, tolerance
from lab.timing import Summary, Times, measure

PASSING_VALUES = 8  # times the gradients' values that sorting and summing them may take
NO_KERNELS = "not timed on a CPU; --check runs the kernels in Triton's interpreter"


class Group(NamedTuple):
    """What is measured together; on a `Host` all but ours, unless it is only checked."""

    device: Device
    shape: Shape
    rules: Collection[str]
    only_check: bool = False

    def bench(self, base: Row, repeats: int, stop: float) -> list[Row]:
        """Check and time every implementation.

        Args:
            base: a row with the columns that the whole run has in common.
            repeats: how often each is timed, at the most.
            stop: the `time.monotonic()` after which no further repeat begins.
        """
        base = replace(base, **self.shape._asdict())
        chosen = [item for item in IMPLEMENTATIONS if item.rule.name in self.rules]
        rows = {item.key: self._blank(base, item) for item in chosen}
        work = self._work()
        if work is None:
            return [row if row.status else replace(row, status=NO_ROOM) for row in rows.values()]
        base.unique_rows, most = work.counted()
        candidates: dict[str, Candidate] = {}
        passing = PASSING_VALUES * self.shape.value_bytes  # that a step takes only while it runs
        for item in chosen:
            row = rows[item.key]
            row.unique_rows = base.unique_rows
            row.step_bytes = item.rule.step_bytes(self.shape, base.unique_rows)
            row.tolerance = tolerance(1 if item.sums else most)
            needed = max(passing, item.passing * self.shape.table_bytes)
            candidate = None if row.status else self._prepared(work, item, row, needed)
            if candidate is not None:
                candidates[item.key], passing = candidate, needed
        timed = {key: rows[key] for key in candidates}
        if timed and not isinstance(self.device, Host):
            timed[COPY] = replace(base, implementation=COPY, status=OK)
            timed[COPY].step_bytes = 2 * COPY_BYTES
        try:
            if timed:
                self._time(timed, candidates, repeats, stop)
        except torch.OutOfMemoryError:
            for row in timed.values():
                row.status, row.detail = NO_ROOM, "together with the others"
        return [*{**rows, **timed}.values()]

    def _blank(self, base: Row, item: Implementation) -> Row:
        version = item.version()
        row = replace(base, rule=item.rule.name, implementation=item.name, version=version or "")
        if version is None:
            row.status, row.detail = NOT_AVAILABLE, f"{item.name} is not installed"
        elif item.name == OURS and isinstance(self.device, Host) and not self.only_check:
            row.status, row.detail = NOT_AVAILABLE, NO_KERNELS
        return row

    def _work(self) -> Embeddings | None:
        """The tables, if they fit the memory."""
        if Embeddings.size(self.shape) > self.device.free_bytes():
            return None
        try:
            return Embeddings(self.shape, self.device.type)
        except torch.OutOfMemoryError:
            return None

    def _prepared(
        self, work: Embeddings, item: Implementation, row: Row, passing: int
    ) -> Candidate | None:
        """What is to be timed, if it is right; what was found out goes into the row."""
        if item.kept_bytes(self.shape) + passing > self.device.free_bytes():
            row.status = NO_ROOM
            return None
        try:
            candidate = item.build(work)
            row.error = check(work, candidate, reference(item.rule))
        except torch.OutOfMemoryError:
            row.status = NO_ROOM
            return None
        except Exception as error:
            row.status, row.detail = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        if row.tolerance is None or not row.error <= row.tolerance:
            row.status = WRONG
        elif self.only_check:
            row.status = RIGHT
        else:
            row.status = OK
            return candidate
        return None

    def _time(
        self,
        rows: Mapping[str, Row],
        candidates: Mapping[str, Candidate],
        repeats: int,
        stop: float,
    ) -> None:
        """Time all in turn, and put what was measured into the rows."""
        batches = cycle(range(BATCHES))

        def renew() -> None:
            batch = next(batches)
            for candidate in candidates.values():
                candidate.load(batch)

        steps: dict[str, Step] = {key: item.step for key, item in candidates.items()}
        if COPY in rows:
            steps[COPY] = self.device.copy
        emptied = self.device.may_cache(min(row.step_bytes or 0 for row in rows.values()))
        times = measure(self.device, steps, emptied, repeats, stop, renew)
        for key, row in rows.items():
            if key in times and (COPY in times or COPY not in rows):
                _fill(row, times[key], times.get(COPY), emptied)
            else:
                row.status = NO_ROOM


def _fill(row: Row, series: Times, copy: Times | None, emptied: bool) -> None:
    """Put what was measured into a row; without a copy there is no GPU."""
    row.repeats = len(series.wall)
    row.wall_us, row.wall_us_p20, row.wall_us_p80 = Summary.of(series.wall)
    if copy is None:
        return
    row.gpu_us, row.gpu_us_p20, row.gpu_us_p80 = Summary.of(series.gpu)
    row.host_us, row.host_us_p20, row.host_us_p80 = Summary.of(series.host)
    row.gaps = sum(series.gaps) / len(series.gaps)
    row.l2 = "emptied" if emptied and row.implementation != COPY else "exceeded"
    if row.implementation in (OURS, COPY):
        row.gb_per_s = (row.step_bytes or 0) / row.gpu_us / 1e3
        row.copy_gb_per_s = 2 * COPY_BYTES / Summary.of(copy.gpu).median / 1e3
        if row.l2 == "exceeded":
            row.percent_of_copy = 100 * row.gb_per_s / row.copy_gb_per_s
