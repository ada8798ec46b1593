"""Everybody's step of one group: checked, measured, and as rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lab.device import COPY_BYTES, Device
from lab.group import Group
from lab.implementations import Implementation, Step
from lab.rows import COPIES, COPY, NO_ROOM, NOT_AVAILABLE, OK, OURS, RIGHT, WRONG, Row
from lab.timing import Summary, Times, measure

NO_KERNELS = "not timed on a CPU; --check runs the kernels in Triton's interpreter"


def bench(
    device: Device, group: Group, base: Row, repeats: int, stop: float, only_check: bool = False
) -> list[Row]:
    """Check and time every implementation on one group; on a `Host`, time all but ours.

    Args:
        device: where.
        group: what.
        base: a row with the columns that the whole run has in common.
        repeats: how often each is timed, at the most.
        stop: the `time.monotonic()` after which no further repeat begins.
        only_check: time nothing.
    """
    base = replace(base, **group.columns())
    implementations = {item.name: item for item in group.workload.implementations}
    rows = {name: _blank(base, group, item) for name, item in implementations.items()}
    if not device.is_gpu and not only_check and not rows[OURS].status:
        rows[OURS].status, rows[OURS].detail = NOT_AVAILABLE, NO_KERNELS
    work = group.made(device)
    if work is None:
        return [row if row.status else replace(row, status=NO_ROOM) for row in rows.values()]
    steps: dict[str, Step] = {}
    reserved = 0  # for what the steps take while they run
    drawn = work.drawn()
    base = replace(base, **drawn)
    for name, row in rows.items():
        vars(row).update(drawn)
        if row.status:
            continue
        kept, passing = work.needed(implementations[name])
        passing = max(passing, reserved)
        if kept + passing and kept + passing > device.free_bytes():
            row.status = NO_ROOM
            continue
        step = _prepare(device, work, implementations[name], row)
        if row.status == OK and only_check:
            row.status = RIGHT
        elif step is not None:
            steps[name], reserved = step, passing
    if steps and device.is_gpu:
        _measure_memory(device, group, implementations, rows, steps)
    if steps:
        _time(device, work, rows, steps, base, repeats, stop)
    return [*rows.values()]


def _blank(base: Row, group: Group, implementation: Implementation) -> Row:
    reason = implementation.why_not(group.rule, group.storage, len(group.layout.tensors))
    return replace(
        base,
        implementation=implementation.name,
        version=implementation.version or "",
        status=NOT_AVAILABLE if reason else "",
        detail=reason or "",
    )


def _prepare(device: Device, work: Any, implementation: Implementation, row: Row) -> Step | None:
    """The implementation's step, if it is right; what was found out goes into the row."""
    before = device.allocated()
    row.tolerance = work.tolerance(implementation)
    try:
        step: Step = work.build(implementation)
        row.error, row.first_ms = work.check(step, device.synchronize)
        row.kept_bytes = device.allocated() - before if device.is_gpu else None
    except torch.OutOfMemoryError:
        row.status = NO_ROOM
        return None
    except Exception as error:
        row.fail(error)
        return None
    row.status = OK if row.error <= row.tolerance else WRONG  # as NaN is
    return step if row.status == OK else None


def _measure_memory(
    device: Device,
    group: Group,
    implementations: Mapping[str, Implementation],
    rows: Mapping[str, Row],
    steps: dict[str, Step],
) -> None:
    """What a step allocates now that everybody's state is there; what no longer fits is out."""
    for name, step in [*steps.items()]:
        try:
            rows[name].step_extra_bytes = device.peak_of(step)
        except torch.OutOfMemoryError:
            rows[name].status = NO_ROOM
            del steps[name]
            continue
        rows[name].peak_bytes = _peak_bytes(group, implementations[name], rows[name])


def _peak_bytes(group: Group, implementation: Implementation, row: Row) -> int:
    """Of one implementation alone, which needs no state beside its own."""
    peak = (row.model_bytes or 0) + (row.kept_bytes or 0) + (row.step_extra_bytes or 0)
    if not implementation.torch_state:  # its state is among what it kept
        peak -= group.layout.state_bytes(group.rule, group.storage)
    return peak


def _time(
    device: Device,
    work: Any,
    rows: dict[str, Row],
    steps: dict[str, Step],
    base: Row,
    repeats: int,
    stop: float,
) -> None:
    """Time all in turn, beside copies on a GPU, and put what was measured into the rows."""
    emptied = device.may_cache(max(rows[name].step_bytes or 0 for name in steps))
    renew = partial(work.renew, [*steps.values()])
    copies = {COPY: (device.copy, 2 * COPY_BYTES), **work.copies(device)} if device.is_gpu else {}
    for name, (step, n_bytes) in copies.items():
        steps[name] = step
        rows[name] = replace(base, implementation=name, status=OK, step_bytes=n_bytes)
        rows[name].params = rows[name].tensors = 0
        rows[name].model_bytes = None
    times = measure(device, steps, emptied, repeats, stop, renew)
    for name in steps:
        if not {*copies, name} <= times.keys():
            rows[name].status = NO_ROOM
    timed = [rows[name] for name in steps if rows[name].status == OK]
    for row in timed:
        _fill(row, times[row.implementation], device.is_gpu, emptied)
    if device.is_gpu:
        _fill_shares(timed, device.peak_bandwidth)


def _fill(row: Row, series: Times, on_gpu: bool, emptied: bool) -> None:
    row.repeats = len(series.wall)
    row.wall_us, row.wall_us_p20, row.wall_us_p80 = Summary.of(series.wall)
    if on_gpu:
        row.host_us, row.host_us_p20, row.host_us_p80 = Summary.of(series.host)
        row.gpu_us, row.gpu_us_p20, row.gpu_us_p80 = Summary.of(series.gpu)
        row.gaps = sum(series.gaps) / len(series.gaps)
        row.gb_per_s = (row.step_bytes or 0) / row.gpu_us / 1e3
        row.l2 = "emptied" if emptied and row.implementation not in COPIES else "exceeded"


def _fill_shares(timed: Sequence[Row], peak_bandwidth: float | None) -> None:
    """Bandwidths beside a row's own, and its shares of them."""
    gb_per_s = {row.implementation: row.gb_per_s for row in timed}
    for row in timed:
        row.copy_gb_per_s, row.mixed_copy_gb_per_s = (gb_per_s.get(name) for name in COPIES)
        row.peak_gb_per_s = peak_bandwidth and peak_bandwidth / 1e9
        if row.l2 == "exceeded" and row.gb_per_s:
            row.percent_of_copy, row.percent_of_mixed_copy, row.percent_of_peak = (
                other and 100 * row.gb_per_s / other
                for other in (row.copy_gb_per_s, row.mixed_copy_gb_per_s, row.peak_gb_per_s)
            )


def count_launches(device: Device, done: Sequence[tuple[Group, list[Row]]], stop: float) -> None:
    """Fill in the launches of rows with a time; compiled steps, which take longest, come last."""
    for compiled in (False, True):
        for group, rows in done:
            named = {row.implementation: row for row in rows if row.status == OK}
            chosen = [item for item in group.workload.implementations if item.name in named]
            chosen = [item for item in chosen if item.compiled == compiled]
            if chosen and time.monotonic() < stop and (work := group.made(device)) is not None:
                for item in chosen:
                    named[item.name].launches = device.launches(work.build(item))
