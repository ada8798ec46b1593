"""How the tensors of a table are cut into the programs of its launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..rule import Rule, State
from ..tensors.sharding import ReduceGroups, local
from . import backend
from .backend import GradVariant
from .grad_signature import GradSignature
from .pointer_tables import addresses_of, as_tensor, column, is_aligned, owners, real_numel
from .tuning import Config


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
    where: str = ""  # the parameter in words

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of all the state that the rule updates."""
        return self.state_names if self.row_state is None else (*self.state_names, self.row_state)


class LaunchSpec(NamedTuple):
    """What one update launch updates, cut into programs."""

    variant: backend.Variant
    config: Config
    owners: Tensor  # int32, one a program: the row of its tensor
    n_bytes: int


MAX_PROGRAMS = 16384  # that one tensor or many are cut into: the last program adds all their sums


class GradLaunchSpec(NamedTuple):
    """What one launch over gradients reads, cut into programs."""

    variant: GradVariant
    reduce_groups: ReduceGroups
    owners: Tensor  # int32, one a program: the row of its tensor
    blocks: int  # of a program
    n_bytes: int


class ChunkedTensors(NamedTuple):
    """The table of rows, on the host, and the launches that read it."""

    rows: Tensor
    updates: list[LaunchSpec]
    grads: list[GradLaunchSpec]


def chunk_tensors(
    rule: Rule, entries: Sequence[PlannedParam], states: Sequence[State]
) -> ChunkedTensors:
    """Chunk the parameters of one device."""
    numels = [real_numel(entry.shard) for entry in entries]
    updated = [
        [local(s[name]) for name in e.state_names] for e, s in zip(entries, states, strict=True)
    ]
    addresses = [addresses_of([e.shard, *u]) for e, u in zip(entries, updated, strict=True)]
    members: dict[backend.Variant, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        if numels[i]:
            members[_variant(rule, entry, updated[i], addresses[i])].append(i)
    first = [0] * len(entries)
    updates = []
    for variant, indices in members.items():
        sizes = [numels[i] for i in indices]
        config = backend.config(variant, sizes, entries[0].shard.device)
        counts = [-(-size // config.chunk) for size in sizes]
        for i, place in zip(indices, accumulate(counts, initial=0), strict=False):
            first[i] = place
        n_bytes = variant.bytes_per_element * sum(sizes)
        updates.append(LaunchSpec(variant, config, owners(indices, counts), n_bytes))
    spreads = [entry.reduce_groups for entry in entries]
    variants = [_grad_variant(entry) for entry in entries]
    norm_first, grads = chunk_grads(numels, variants, spreads, entries[0].shard.device)
    rows: list[int] = []
    for i, entry in enumerate(entries):
        rows += backend.row(numels[i], entry.group, first[i], addresses[i], norm_first[i])
    return ChunkedTensors(as_tensor(column("q", rows)).view(-1, backend.ROW_WIDTH), updates, grads)


def _variant(
    rule: Rule, entry: PlannedParam, states: Sequence[Tensor], addresses: Sequence[int]
) -> backend.Variant:
    grad = _grad_variant(entry)
    return backend.Variant(
        flags=entry.flags,
        n_states=len(states),
        param_dtype=backend.STORAGE_DTYPES[entry.shard.dtype],
        grad_dtype=grad.dtype,
        state_dtype=backend.STORAGE_DTYPES[(states[0] if states else entry.shard).dtype],
        aligned=grad.aligned and is_aligned(addresses),
        reads_step=rule.reads_step_under(entry.flags),
    )


def _grad_variant(entry: PlannedParam) -> GradVariant:
    assert entry.signature.grad is not None
    aligned = entry.reordered or entry.signature.is_aligned
    return GradVariant(backend.STORAGE_DTYPES[entry.signature.grad.dtype], aligned)


def chunk_grads(
    numels: Sequence[int],
    variants: Sequence[GradVariant],
    spreads: Sequence[ReduceGroups],
    device: torch.device,
) -> tuple[list[int], list[GradLaunchSpec]]:
    """Every tensor's first program, and the launches: one for those of a variant reduced alike."""
    members: dict[tuple[GradVariant, ReduceGroups], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(variants, spreads, strict=True)):
        members[key].append(i)
    first = [0] * len(numels)
    cuts = []
    for (variant, reduce_groups), indices in members.items():
        config = backend.grad_config(variant.dtype, device)
        sizes = [numels[i] for i in indices]
        blocks = max(config.blocks, -(-sum(sizes) // (config.block_size * MAX_PROGRAMS)))
        counts = [-(-size // (config.block_size * blocks)) for size in sizes]
        for i, place in zip(indices, accumulate(counts, initial=0), strict=False):
            first[i] = place
        n_bytes = backend.ITEM_SIZES[variant.dtype] * sum(sizes)
        cuts.append(
            GradLaunchSpec(variant, reduce_groups, owners(indices, counts), blocks, n_bytes)
        )
    return first, cuts
