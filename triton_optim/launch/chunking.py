"""How the tensors of a table are cut into the programs of its launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..rule import Rule, State
from ..tensors.layout import Layout
from ..tensors.sharding import ReduceGroups, local
from . import backend, kernel_args
from .formats import Stored
from .launcher import LaunchSpec
from .pointer_tables import (
    addresses_of,
    as_tensor,
    column,
    is_aligned,
    on_device,
    real_numel,
)
from .row_launcher import Kind, address_of, kind_of
from .variant import ITEM_SIZES, STORAGE_DTYPES, GradVariant, Variant


class GradSignature(NamedTuple):
    """A gradient's layout, and its parameter's then; shards of DTensors."""

    param: Layout | None  # None of another kind of tensor
    grad: Layout | None  # None of a sparse gradient
    is_taken: bool = False  # whether a kernel takes the parameter
    kind: Kind | None = None  # of one that is updated row by row
    is_aligned: bool = True

    @classmethod
    def of(cls, shard: Tensor, grad: Tensor, *, row_wise: bool) -> GradSignature:
        """Of a parameter that the kernels take."""
        if not row_wise:
            aligned = is_aligned([grad.data_ptr()])
            return cls(Layout.of(shard), Layout.of(grad), True, None, aligned)
        values = grad._values() if grad.layout == torch.sparse_coo else grad
        return cls(Layout.of(shard), None, True, kind_of(grad), is_aligned([address_of(values)]))


class PlannedParam(NamedTuple):
    """One parameter that the kernels take."""

    position: int  # among all of the optimizer's
    param: Tensor
    shard: Tensor  # the parameter, or of a DTensor what this rank holds
    grad: Tensor | None  # likewise; None where it is missing
    signature: GradSignature  # of the gradient, be it missing or not
    reduce_groups: ReduceGroups
    group: int
    flags: frozenset[str]
    state_names: tuple[str, ...]
    reordered: bool = False  # gradients must be copied into the parameter's memory order first
    row_state: str | None = None  # name of the state that has one number a row
    beside: tuple[str, ...] = ()  # names of the state that belongs to formats
    place: tuple[int, int] = (0, 0)  # its group and where it stands there, by which it is random
    where: str = ""  # the parameter in words

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of all the state that the kernels update."""
        more = () if self.row_state is None else (self.row_state,)
        return (*self.state_names, *more, *self.beside)


MAX_PROGRAMS = 16384  # that one tensor or many are cut into: the last program adds all their sums


class GradLaunchSpec(NamedTuple):
    """What one launch over gradients reads, cut into programs."""

    variant: GradVariant
    reduce_groups: ReduceGroups
    block_to_tensor: Tensor  # int32, one a program: the row of its tensor
    blocks: int  # of a program
    n_bytes: int


class ChunkedTensors(NamedTuple):
    """The tables of rows and of formats, on the host, and the launches that read them."""

    rows: Tensor
    formats: Tensor | None
    updates: list[LaunchSpec]
    grads: list[GradLaunchSpec]


def chunk_tensors(
    rule: Rule, planned: Sequence[PlannedParam], states: Sequence[State], options: Options
) -> ChunkedTensors:
    """Chunk the parameters of one device."""
    device = planned[0].shard.device
    numels = [real_numel(item.shard) for item in planned]
    updated = [
        [local(s[name]) for name in p.state_names] for p, s in zip(planned, states, strict=True)
    ]
    addresses = [addresses_of([p.shard, *u]) for p, u in zip(planned, updated, strict=True)]
    stored = [
        Stored.of(p.param, s, p.state_names, rule, p.place, p.where, options)
        for p, s in zip(planned, states, strict=True)
    ]
    members: dict[Variant, list[int]] = defaultdict(list)
    for i, item in enumerate(planned):
        if numels[i]:
            members[_variant(rule, item, stored[i], addresses[i])].append(i)
    first = [0] * len(planned)
    updates = []
    for variant, indices in members.items():
        sizes = [numels[i] for i in indices]
        config = backend.config(variant, sizes, device)
        programs = on_device(assign_programs(indices, sizes, config.chunk, first), device)
        n_bytes = variant.bytes_per_element * sum(sizes)
        updates.append(LaunchSpec(variant, config, programs, n_bytes))
    variants = [_grad_variant(item) for item in planned]
    reduced = [item.reduce_groups for item in planned]
    norm_first, grads = chunk_grads(numels, variants, reduced, device)
    rows: list[int] = []
    for i, item in enumerate(planned):
        rows += kernel_args.row(numels[i], item.group, first[i], addresses[i], norm_first[i])
    formats = None
    if any(variant.has_formats for variant in members):
        formats = _table(chain.from_iterable(item.row for item in stored), backend.FORMAT_WIDTH)
    return ChunkedTensors(_table(rows, backend.ROW_WIDTH), formats, updates, grads)


def _table(values: Iterable[int], width: int) -> Tensor:
    return as_tensor(column("q", [*values])).view(-1, width)


def chunk_grads(
    numels: Sequence[int],
    variants: Sequence[GradVariant],
    reduced: Sequence[ReduceGroups],
    device: torch.device,
) -> tuple[list[int], list[GradLaunchSpec]]:
    """Every tensor's first program, and the launches: one for those of a variant reduced alike."""
    members: dict[tuple[GradVariant, ReduceGroups], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(variants, reduced, strict=True)):
        members[key].append(i)
    first = [0] * len(numels)
    specs = []
    for (variant, reduce_groups), indices in members.items():
        config = backend.grad_config(variant.dtype, device)
        sizes = [numels[i] for i in indices]
        blocks = max(config.blocks, -(-sum(sizes) // (config.block_size * MAX_PROGRAMS)))
        programs = assign_programs(indices, sizes, config.block_size * blocks, first)
        n_bytes = ITEM_SIZES[variant.dtype] * sum(sizes)
        specs.append(GradLaunchSpec(variant, reduce_groups, programs, blocks, n_bytes))
    return first, specs


def assign_programs(
    tensors: Sequence[int], sizes: Sequence[int], chunk: int, first: list[int]
) -> Tensor:
    """Which tensor each program of a launch updates: int32 [programs].

    Args:
        tensors: their rows in the table.
        sizes: their elements.
        chunk: elements of a program.
        first: gets the first program of each, by row.
    """
    counts = [-(-size // chunk) for size in sizes]
    for i, program in zip(tensors, accumulate(counts, initial=0), strict=False):
        first[i] = program
    rows = torch.tensor(tensors, dtype=torch.int32, device="cpu")
    return torch.repeat_interleave(rows, torch.tensor(counts, device="cpu"))


def _variant(rule: Rule, item: PlannedParam, stored: Stored, addresses: Sequence[int]) -> Variant:
    grad, (param_dtype, *state_dtypes) = _grad_variant(item), stored.formats
    variant = Variant(
        flags=item.flags,
        param_dtype=param_dtype,
        grad_dtype=grad.dtype,
        state_dtypes=tuple(state_dtypes),
        aligned=grad.aligned and is_aligned([*addresses, stored.remainder]),
        reads_step=rule.reads_step_under(item.flags),
        sharding=stored.sharding,
    )
    return variant._replace(reads_step=variant.reads_step or variant.rounds)


def _grad_variant(item: PlannedParam) -> GradVariant:
    assert item.signature.grad is not None
    aligned = item.reordered or item.signature.is_aligned
    return GradVariant(STORAGE_DTYPES[item.signature.grad.dtype], aligned)
