"""Host time of steps of embeddings whose kernels nothing launches: without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

from lab.dry_gpu import dry_gpu
from lab.embedding_steps import Candidate
from lab.embedding_tables import BATCHES, UNIFORM, Tables
from lab.embeddings import Embeddings
from lab.group import Group, groups_of
from lab.implementations import Implementation
from lab.rows import OK, OURS, TORCH_SPARSE, Row
from lab.timing import Summary, in_turn
from triton_optim.launch.launcher import record_launches

SUITE = "embeddings-dry"
BATCH = 32  # ids a table: so few that torch's times are its host's
ROWS, DIM = 1000, 16
REPEATS = 50
TABLES = (1, 26)  # 26 are DLRM's


def dry_rows(base: Row, rules: Collection[str]) -> Iterator[list[Row]]:
    """Host time of our steps, and of torch's over so few ids that arithmetic hardly counts.

    Kernels are compiled for sm_90, and a launcher that does nothing gets them. What torch does
    between them, such as the sort, the CPU does. Every step gets another gradient.
    """
    base = replace(base, gpu="none, compiled for sm_90")
    for tables in TABLES:
        shape = Tables(ROWS, DIM, BATCH, UNIFORM, tables)
        for group in groups_of(SUITE, shape):
            if group.rule.name in rules:
                with dry_gpu():
                    work = Embeddings(shape, group.rule, group.storage, "cpu")
                    yield _rows(replace(base, **group.columns()), group, work)


def _rows(base: Row, group: Group, work: Embeddings) -> list[Row]:
    rows: dict[str, Row] = {}
    prepare: dict[str, Callable[[], Candidate]] = {}
    for item in work.implementations:
        if item.name in (OURS, TORCH_SPARSE) and item.refusal(group.rule, group.storage) is None:
            row = replace(base, implementation=item.name, version=item.version or "", status=OK)
            rows[item.name] = row
            try:
                prepare[item.name] = partial(_loaded, _launching(work, item), cycle(range(BATCHES)))
            except Exception as error:
                row.fail(error)
    for name, series in in_turn(prepare, REPEATS).items():
        rows[name].repeats = REPEATS
        rows[name].host_us, rows[name].host_us_p20, rows[name].host_us_p80 = Summary.of(series)
    return [*rows.values()]


def _loaded(candidate: Candidate, batches: Iterator[int]) -> Candidate:
    candidate.load(next(batches))
    return candidate


def _launching(work: Embeddings, item: Implementation) -> Candidate:
    """A candidate that has taken a step, and launched a kernel if it is ours."""
    candidate = work.build(item)
    with record_launches() as launches:
        candidate()
    if item.name == OURS and not launches:
        raise RuntimeError("no kernel took these gradients")
    return candidate
