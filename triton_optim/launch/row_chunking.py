"""How the tensors of a table by rows are put into launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..rule import RowWise, Rule, State
from . import row_launcher
from .chunking import PlannedParam
from .pointer_tables import addresses_of, as_tensor, column
from .row_launcher import RowVariant, rows_and_width
from .variant import STORAGE_DTYPES

MAX_KEYS = 2**31  # of int32, which are sorted in half the time of int64


class ChunkedRows(NamedTuple):
    """The table of tensors, on the host, and which of them each launch updates."""

    tensors: Tensor  # int64 [tensors, TENSOR_COLUMNS]
    launches: list[tuple[RowVariant, range]]
    key_dtype: torch.dtype


def grouped(
    rule: Rule, state: Mapping[Tensor, State], planned: Iterable[PlannedParam]
) -> dict[RowVariant, list[PlannedParam]]:
    """Entries by what their kernel is compiled for; those with sparse gradients come first."""
    members: dict[RowVariant, list[PlannedParam]] = defaultdict(list)
    for item in planned:
        members[_variant(rule, state.get(item.param, {}), item)].append(item)
    return dict(sorted(members.items(), key=lambda item: not item[0].sparse))


def chunk_rows(
    members: dict[RowVariant, list[PlannedParam]], states: Sequence[State]
) -> ChunkedRows:
    """Chunk the parameters of one device, `grouped`, whose states stand in that order."""
    planned = [*chain.from_iterable(members.values())]
    shapes = [rows_and_width(item.param) for item in planned]
    first_keys = [*accumulate((rows + 1 for rows, _ in shapes), initial=0)]
    addresses, table = [], []
    for item, state, (rows, width), key in zip(planned, states, shapes, first_keys, strict=False):
        own = addresses_of([item.param, *(state[name] for name in item.state_names)])
        row_state = 0 if item.row_state is None else state[item.row_state].data_ptr()
        table += row_launcher.tensor_row(item.group, width, rows, key, own, row_state)
        addresses.append(own)
    launches, start = [], 0
    for variant, mine in members.items():
        tensors = range(start, start + len(mine))
        misaligned = [not item.signature.is_aligned for item in mine]
        everything = chain(chain.from_iterable(addresses[i] for i in tensors), misaligned)
        launches.append((variant.loading(everything, [shapes[i][1] for i in tensors]), tensors))
        start = tensors.stop
    key_dtype = torch.int32 if first_keys[-1] <= MAX_KEYS else torch.int64
    on_host = as_tensor(column("q", table)).view(-1, row_launcher.TENSOR_COLUMNS)
    return ChunkedRows(on_host, launches, key_dtype)


def _variant(rule: Rule, state: State, item: PlannedParam) -> RowVariant:
    kind = item.signature.kind
    assert kind is not None
    held = [state[name] for name in item.state_names if name in state]
    rows = rule.row_wise or RowWise()
    by_row = item.row_state is not None
    storage = STORAGE_DTYPES
    return RowVariant(
        sparse=kind.layout == torch.sparse_coo,
        flags=item.flags,
        n_states=len(item.state_names),
        param_dtype=storage[item.param.dtype],
        grad_dtype=storage[kind.dtype],
        state_dtype=storage[(held or [item.param])[0].dtype],
        row_dtype=row_launcher.dtype_name(rows.dtype(item.param)) if by_row else None,
        columns=row_launcher.columns_for(rows_and_width(item.param)[1]),
        reads_step=rule.rows_read_step_under(item.flags),
    )
