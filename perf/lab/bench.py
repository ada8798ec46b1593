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
    device: Device, group: Group, base: Row, repeats: int, stop: float, *,
    only_check: bool = False, implementations: Sequence[Implementation] | None = None,
) -> list[Row]:  # fmt: skip
    """Check and time every implementation on one group; on a `Host`, time all but ours.

    Args:
        device: where.
        group: what.
        base: a row with the columns that the whole run has in common.
        repeats: how often each is timed, at the most.
        stop: the `time.monotonic()` after which no further repeat begins.
        only_check: time nothing.
        implementations: those of the group's workload by default.
    """
    items = {item.name: item for item in implementations or group.workload.implementations}
    base = replace(base, **group.columns())
    rows = {
        name: replace(base, implementation=name, version=item.version or "")
        for name, item in items.items()
    }
    for name, row in rows.items():
        reason = items[name].why_not(group.rule, group.storage, len(group.layout.tensors))
        if name == OURS and not (device.is_gpu or only_check):
            reason = reason or NO_KERNELS
        row.status, row.detail = NOT_AVAILABLE if reason else "", reason or ""
    work = group.made(device)
    drawn = work.drawn() if work else {}
    for row in rows.values():
        vars(row).update(drawn, status=row.status if work else row.status or NO_ROOM)
    steps = _prepared(device, work, items, rows)
    for row in rows.values():
        if only_check and row.status == OK:
            row.status = RIGHT
    if steps and not only_check:
        if device.is_gpu:
            _measure_memory(device, group, items, rows, steps)
        _time(device, work, rows, steps, replace(base, **drawn), repeats, stop)
    return [*rows.values()]


def _prepared(
    device: Device, work: Any, items: Mapping[str, Implementation], rows: Mapping[str, Row]
) -> dict[str, Step]:
    """The steps that are right and have room; what was found out goes into the rows."""
    steps: dict[str, Step] = {}
    reserved = 0  # for what the steps take while they run
    for name, row in rows.items():
        if not row.status:
            kept, passing = work.needed(items[name])
            passing = max(passing, reserved)
            if kept + passing and kept + passing > device.free_bytes():
                row.status = NO_ROOM
            elif step := _right_step(device, work, items[name], row):
                steps[name], reserved = step, passing
    return steps


def _right_step(device: Device, work: Any, implementation: Implementation, row: Row) -> Step | None:
    before = device.allocated()
    row.tolerance = work.tolerance(implementation)
    try:
        step: Step = work.build(implementation)
        row.error, row.first_ms = work.check(step, device.synchronize)
        row.kept_bytes = device.allocated() - before if device.is_gpu else None
        row.status = OK if row.error <= row.tolerance else WRONG  # as NaN is
    except torch.OutOfMemoryError:
        row.status = NO_ROOM
    except Exception as error:
        row.fail(error)
    return step if row.status == OK else None


def _measure_memory(
    device: Device, group: Group, items: Mapping[str, Implementation], rows: Mapping[str, Row],
    steps: dict[str, Step],
) -> None:  # fmt: skip
    """What a step allocates now that everybody's state is there; what no longer fits is out."""
    for name in [*steps]:
        try:
            rows[name].step_extra_bytes = device.peak_of(steps[name])
            rows[name].peak_bytes = _peak_bytes(group, items[name], rows[name])
        except torch.OutOfMemoryError:
            rows[name].status = NO_ROOM
            del steps[name]


def _peak_bytes(group: Group, implementation: Implementation, row: Row) -> int:
    """Of one implementation alone, which needs no state beside its own."""
    peak = (row.model_bytes or 0) + (row.kept_bytes or 0) + (row.step_extra_bytes or 0)
    if not implementation.shares_state(group.storage):  # its state is among what it kept
        peak -= group.layout.state_bytes(group.rule, group.storage)
    return peak


def _time(
    device: Device, work: Any, rows: dict[str, Row], steps: dict[str, Step], base: Row,
    repeats: int, stop: float,
) -> None:  # fmt: skip
    """Time all in turn, beside copies on a GPU, and put what was measured into the rows."""
    emptied = device.may_cache(max(rows[name].step_bytes or 0 for name in steps))
    renew = partial(work.renew, [*steps.values()])
    copies = {COPY: (device.copy, 2 * COPY_BYTES), **work.copies(device)} if device.is_gpu else {}
    base = replace(base, status=OK, params=0, tensors=0, model_bytes=None)
    for name, (step, n_bytes) in copies.items():
        steps[name], rows[name] = step, replace(base, implementation=name, step_bytes=n_bytes)
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
    for clock in ("wall", "host", "gpu") if on_gpu else ("wall",):
        for end, value in zip(
            ("", "_p20", "_p80"), Summary.of(getattr(series, clock)), strict=True
        ):
            setattr(row, f"{clock}_us{end}", value)
    if on_gpu:
        row.gaps = sum(series.gaps) / len(series.gaps)
        row.gb_per_s = (row.step_bytes or 0) / (row.gpu_us or 0) / 1e3
        row.l2 = "emptied" if emptied and row.implementation not in COPIES else "exceeded"


def _fill_shares(timed: Sequence[Row], peak_bandwidth: float | None) -> None:
    """Bandwidths beside a row's own, and its shares of them."""
    gb_per_s = {row.implementation: row.gb_per_s for row in timed}
    beside = dict(zip(("copy", "mixed_copy"), map(gb_per_s.get, COPIES), strict=True))
    beside["peak"] = peak_bandwidth and peak_bandwidth / 1e9
    for row in timed:
        for name, other in beside.items():
            setattr(row, f"{name}_gb_per_s", other)
            if other and row.gb_per_s and row.l2 == "exceeded":
                setattr(row, f"percent_of_{name}", 100 * row.gb_per_s / other)


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
