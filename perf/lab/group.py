"""What is measured together: one layout, rule and storage, by every implementation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lab.device import COPY_BYTES, Device
from lab.implementations import (
    COPIES,
    COPY,
    IMPLEMENTATIONS,
    MIXED_COPY,
    Implementation,
    Rule,
    Step,
    Storage,
    bytes_per_param,
    package_version,
)
from lab.mixed_copy import MixedCopy
from lab.rows import FAILED, NO_ROOM, NOT_AVAILABLE, OK, WRONG, Row
from lab.suites import Layout
from lab.timing import Summary, Times, measure
from lab.workload import Workload, tolerance


class Group(NamedTuple):
    """What is measured together."""

    suite: str
    layout: Layout
    rule: Rule
    storage: Storage


def bench(device: Device, group: Group, base: Row, repeats: int, stop: float) -> list[Row]:
    """Check and time every implementation on one group.

    Args:
        device: where.
        group: what.
        base: a row with the columns that the whole run has in common.
        repeats: how often each is timed, at the most.
        stop: the `time.monotonic()` after which no further repeat begins.
    """
    suite, layout, rule, storage = group
    base = replace(
        base,
        suite=suite,
        layout=layout.name,
        tensors=len(layout.tensors),
        params=layout.params,
        rule=rule.name,
        storage=storage.name,
        step_bytes=layout.params * bytes_per_param(rule, storage),
        model_bytes=Workload.size(layout, rule, storage),
        tolerance=tolerance(storage),
    )
    rows = [_blank(base, group, implementation) for implementation in IMPLEMENTATIONS]
    workload = _workload(device, group)
    if workload is None:
        return [row if row.status else replace(row, status=NO_ROOM) for row in rows]
    steps: dict[str, Step] = {}
    for row, implementation in zip(rows, IMPLEMENTATIONS, strict=True):
        step = None if row.status else _prepare(device, workload, implementation, row)
        if step is not None:
            steps[row.implementation] = step
    _measure_memory(device, group, rows, steps)
    if steps:
        emptied = device.may_cache(base.step_bytes or 0)
        mixed = MixedCopy(device.copied, rule, storage)
        mixed.tune(device)
        rows += [_copy_row(base, COPY, 2 * COPY_BYTES), _copy_row(base, MIXED_COPY, mixed.n_bytes)]
        steps |= {COPY: device.copy, MIXED_COPY: mixed.run}
        times = measure(device, steps, emptied, repeats, stop, workload.renew)
        _fill(rows, times, emptied, device.peak_bandwidth)
    return rows


def _copy_row(base: Row, name: str, n_bytes: int) -> Row:
    row = replace(base, implementation=name, status=OK, step_bytes=n_bytes)
    return replace(row, params=0, tensors=0, model_bytes=None, tolerance=None)


def _blank(base: Row, group: Group, implementation: Implementation) -> Row:
    reason = implementation.why_not(group.rule, group.storage, len(group.layout.tensors))
    return replace(
        base,
        implementation=implementation.name,
        version=package_version(implementation.package) or "",
        status=NOT_AVAILABLE if reason else "",
        detail=reason or "",
    )


def _workload(device: Device, group: Group) -> Workload | None:
    """The group's tensors, if they fit the memory."""
    tensors = (group.layout, group.rule, group.storage)
    if Workload.size(*tensors) > device.free_bytes():
        return None
    try:
        return Workload(*tensors, device.type)
    except torch.OutOfMemoryError:
        return None


def _prepare(
    device: Device, workload: Workload, implementation: Implementation, row: Row
) -> Step | None:
    """The implementation's step, if it is right; what was found out goes into the row."""
    before = device.allocated()
    try:
        step = workload.build(implementation)
        row.error, row.first_ms = workload.check(step, device.synchronize)
        row.kept_bytes = device.allocated() - before
    except torch.OutOfMemoryError:
        row.status = NO_ROOM
        return None
    except Exception as error:
        row.status = FAILED
        row.detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    row.status = OK if row.error <= tolerance(workload.storage) else WRONG
    return step if row.status == OK else None


def _measure_memory(
    device: Device, group: Group, rows: Sequence[Row], steps: dict[str, Step]
) -> None:
    """What a step allocates now that everybody's state is there; what no longer fits is out."""
    for row, implementation in zip(rows, IMPLEMENTATIONS, strict=True):
        if row.implementation in steps:
            try:
                row.step_extra_bytes = device.peak_of(steps[row.implementation])
            except torch.OutOfMemoryError:
                row.status = NO_ROOM
                del steps[row.implementation]
                continue
            row.peak_bytes = _peak_bytes(group, implementation, row)


def _peak_bytes(group: Group, implementation: Implementation, row: Row) -> int:
    """Of one implementation alone, which needs no state beside its own."""
    peak = (row.model_bytes or 0) + (row.kept_bytes or 0) + (row.step_extra_bytes or 0)
    if not implementation.torch_state:  # its state is among what it kept
        peak -= row.params * len(group.rule.states) * group.storage.state.itemsize
    return peak


def _fill(
    rows: Sequence[Row], times: dict[str, Times], emptied: bool, peak_bandwidth: float | None
) -> None:
    """Put what was measured into the rows."""
    for row in rows:
        if row.status == OK and not {*COPIES, row.implementation} <= times.keys():
            row.status = NO_ROOM
    timed = [row for row in rows if row.status == OK]
    for row in timed:
        series = times[row.implementation]
        row.repeats = len(series.gpu)
        row.gpu_us, row.gpu_us_p20, row.gpu_us_p80 = Summary.of(series.gpu)
        row.wall_us, row.wall_us_p20, row.wall_us_p80 = Summary.of(series.wall)
        row.host_us, row.host_us_p20, row.host_us_p80 = Summary.of(series.host)
        row.gaps = sum(series.gaps) / len(series.gaps)
        row.gb_per_s = (row.step_bytes or 0) / row.gpu_us / 1e3
        row.l2 = "emptied" if emptied and row.implementation not in COPIES else "exceeded"
    gb_per_s = {row.implementation: row.gb_per_s or 0.0 for row in timed}
    for row in timed:
        rate = gb_per_s[row.implementation]
        row.copy_gb_per_s, row.mixed_copy_gb_per_s = (gb_per_s[name] for name in COPIES)
        row.peak_gb_per_s = peak_bandwidth and peak_bandwidth / 1e9
        if row.l2 == "exceeded":
            row.percent_of_copy = 100 * rate / row.copy_gb_per_s
            row.percent_of_mixed_copy = 100 * rate / row.mixed_copy_gb_per_s
            row.percent_of_peak = row.peak_gb_per_s and 100 * rate / row.peak_gb_per_s


def count_launches(device: Device, done: Sequence[tuple[Group, list[Row]]], stop: float) -> None:
    """Fill in the launches of rows with a time; compiled steps, which take longest, come last."""
    for compiled in (False, True):
        for group, rows in done:
            named = {row.implementation: row for row in rows if row.status == OK}
            chosen = [i for i in IMPLEMENTATIONS if i.compiled == compiled and i.name in named]
            if chosen and time.monotonic() < stop:
                _count(device, group, chosen, named)


def _count(
    device: Device, group: Group, chosen: Sequence[Implementation], rows: Mapping[str, Row]
) -> None:
    workload = _workload(device, group)
    if workload is not None:
        for implementation in chosen:
            step = workload.build(implementation)
            rows[implementation.name].launches = device.launches(step)
