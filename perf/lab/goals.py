"""The goals that this package set itself, judged from the rows of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lab.implementations import OURS, TORCH_BEST
from lab.rows import OK, Row
from lab.suites import SMALL_TENSORS

LARGE = 100_000_000  # parameters of a large model
SHARE_OF_COPY = 95.0  # percent
FOREACH_SPEEDUP = 2.5
FUSED_SPEEDUP = 3.0
EXTRA_MEMORY = 0.1  # percent of parameters, gradients and state

Group = dict[str, Row]


class Goal(NamedTuple):
    """One goal and how near the worst row comes to it."""

    text: str
    reached: str
    met: bool


def judged(rows: Iterable[Row]) -> list[Goal]:
    """The goals about which these rows say something."""
    groups: dict[tuple[str, str, str], Group] = defaultdict(dict)
    for row in rows:
        if row.status == OK:
            groups[row.group][row.implementation] = row
    ours = [group for group in groups.values() if OURS in group]
    return [*_bandwidth(ours), *_never_slower(ours), *_speedups(ours), *_memory(ours)]


def _bandwidth(groups: Sequence[Group]) -> Iterator[Goal]:
    rows = [group[OURS] for group in groups]
    shares = [(r.percent_of_copy, r) for r in rows if r.params >= LARGE and r.percent_of_copy]
    if shares:
        share, row = min(shares, key=lambda pair: pair[0])
        yield Goal(
            f"at least {SHARE_OF_COPY:g} % of copy bandwidth from 100 M parameters up",
            f"{share:.1f} % ({_where(row)})",
            round(share, 1) >= SHARE_OF_COPY,
        )


def _never_slower(groups: Sequence[Group]) -> Iterator[Goal]:
    sweep = [group for group in groups if group[OURS].suite == "sweep"]
    for label, column in (("GPU", "gpu_us"), ("wall", "wall_us")):
        ratios = [(_time(group[OURS], column) / _best(group, column), group) for group in sweep
                  if not group.keys().isdisjoint(TORCH_BEST)]  # fmt: skip
        if ratios:
            ratio, group = max(ratios, key=lambda pair: pair[0])
            yield Goal(
                f"never slower than the best of torch's own in the sweep, {label} time",
                f"{ratio:.2f} of its time ({_where(group[OURS])})",
                round(ratio, 2) <= 1,
            )


def _speedups(groups: Sequence[Group]) -> Iterator[Goal]:
    large = [g for g in groups if g[OURS].params >= LARGE and g[OURS].rule not in _SGD]
    yield from _speedup(
        large, "torch foreach", "gpu_us", FOREACH_SPEEDUP, "foreach Adagrad and RMSprop, large"
    )
    small = [g for g in groups if g[OURS].layout == SMALL_TENSORS]
    for label, column in (("GPU", "gpu_us"), ("wall", "wall_us")):
        what = f"fused torch on 1,000 small tensors, {label} time"
        yield from _speedup(small, "torch fused", column, FUSED_SPEEDUP, what)


_SGD = ("sgd", "momentum")


def _speedup(
    groups: Sequence[Group], other: str, column: str, wanted: float, what: str
) -> Iterator[Goal]:
    ratios = [
        (_time(group[other], column) / _time(group[OURS], column), group)
        for group in groups
        if other in group
    ]
    if ratios:
        ratio, group = min(ratios, key=lambda pair: pair[0])
        reached = f"{ratio:.2f}x ({_where(group[OURS])})"
        yield Goal(f"at least {wanted:g}x {what}", reached, round(ratio, 2) >= wanted)


def _memory(groups: Sequence[Group]) -> Iterator[Goal]:
    shares = []
    for row in (group[OURS] for group in groups):
        if row.params >= LARGE and row.model_bytes and row.kept_bytes is not None:
            extra = row.kept_bytes + (row.step_extra_bytes or 0)
            shares.append((100 * extra / row.model_bytes, row))
    if shares:
        share, row = max(shares, key=lambda pair: pair[0])
        yield Goal(
            f"extra memory under {EXTRA_MEMORY:g} %",
            f"{share:.3f} % ({_where(row)})",
            share < EXTRA_MEMORY,
        )


def _best(group: Group, column: str) -> float:
    return min(_time(group[name], column) for name in TORCH_BEST if name in group)


def _time(row: Row, column: str) -> float:
    return float(getattr(row, column))


def _where(row: Row) -> str:
    return f"{row.layout}, {row.rule}, {row.storage}"
