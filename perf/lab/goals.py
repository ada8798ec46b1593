"""The goals that this package set itself, judged from the rows of a run on a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lab.embedding_steps import TORCH_SPARSE
from lab.implementations import ADAGRAD, OURS, ROWWISE, TORCH_BEST
from lab.rows import OK, Row
from lab.suites import SMALL_TENSORS

LARGE = 100_000_000  # parameters of a large model
SHARE_OF_COPY = 95.0  # percent
FOREACH_SPEEDUP = 2.5
FUSED_SPEEDUP = 3.0
EXTRA_MEMORY = 0.1  # percent of parameters, gradients and state
# Of embedding tables.
SPARSE_SPEEDUP = 10.0  # over torch's sparse Adagrad
SHARE_BY_ROWS = 80.0  # percent of the copy
MANY_ROWS = 100_000  # touched ones, from which on that share is a goal

Group = dict[str, Row]


class Goal(NamedTuple):
    """One goal and how near the worst row comes to it."""

    text: str
    reached: str
    met: bool


def judged(rows: Iterable[Row]) -> list[Goal]:
    """The goals about which these rows say something."""
    dense: dict[tuple[str, ...], Group] = defaultdict(dict)
    embeddings: dict[tuple[str, ...], Group] = defaultdict(dict)
    for row in rows:
        if row.status == OK and row.gpu_us:
            (embeddings if row.batch else dense)[row.group][row.implementation] = row
    ours = [group for group in dense.values() if OURS in group]
    large = [group[OURS] for group in ours if group[OURS].params >= LARGE]
    by_rows = [group[OURS] for group in embeddings.values() if OURS in group]
    many = [row for row in by_rows if (row.unique_rows or 0) >= MANY_ROWS]
    return [
        *_bandwidth(large, SHARE_OF_COPY, "copy bandwidth from 100 M parameters up"),
        *_never_slower(ours),
        *_speedups(ours),
        *_memory(large),
        *_sparse_speedups(embeddings),
        *_bandwidth(
            many, SHARE_BY_ROWS, f"copy bandwidth on touched bytes, from {MANY_ROWS:,} rows up"
        ),
    ]


def _bandwidth(rows: Sequence[Row], wanted: float, what: str) -> Iterator[Goal]:
    shares = [(row.percent_of_copy, row) for row in rows if row.percent_of_copy]
    if shares:
        share, row = min(shares, key=lambda pair: pair[0])
        reached = f"{share:.1f} % ({_where(row)})"
        yield Goal(f"at least {wanted:g} % of {what}", reached, round(share, 1) >= wanted)


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
    pairs = [(g[OURS], g["torch foreach"]) for g in large if "torch foreach" in g]
    yield from _speedup(pairs, "gpu_us", FOREACH_SPEEDUP, "foreach Adagrad and RMSprop, large")
    small = [g for g in groups if g[OURS].layout == SMALL_TENSORS]
    pairs = [(g[OURS], g["torch fused"]) for g in small if "torch fused" in g]
    for label, column in (("GPU", "gpu_us"), ("wall", "wall_us")):
        what = f"fused torch on 1,000 small tensors, {label} time"
        yield from _speedup(pairs, column, FUSED_SPEEDUP, what)


_SGD = ("sgd", "momentum")


def _sparse_speedups(groups: Mapping[tuple[str, ...], Group]) -> Iterator[Goal]:
    for rule in (ADAGRAD.name, ROWWISE.name):
        pairs = [
            (group[OURS], groups[layout, ADAGRAD.name, storage][TORCH_SPARSE])
            for (layout, of, storage), group in groups.items()
            if of == rule and OURS in group
            if TORCH_SPARSE in groups.get((layout, ADAGRAD.name, storage), {})
        ]
        for label, column in (("GPU", "gpu_us"), ("wall", "wall_us")):
            what = f"torch's sparse Adagrad by {rule}, {label} time"
            yield from _speedup(pairs, column, SPARSE_SPEEDUP, what)


def _speedup(
    pairs: Iterable[tuple[Row, Row]], column: str, wanted: float, what: str
) -> Iterator[Goal]:
    """Of pairs of our row and another."""
    ratios = [(_time(other, column) / _time(ours, column), ours) for ours, other in pairs]
    if ratios:
        ratio, row = min(ratios, key=lambda pair: pair[0])
        reached = f"{ratio:.2f}x ({_where(row)})"
        yield Goal(f"at least {wanted:g}x {what}", reached, round(ratio, 2) >= wanted)


def _memory(rows: Iterable[Row]) -> Iterator[Goal]:
    shares = []
    for row in rows:
        if row.model_bytes and row.kept_bytes is not None:
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
