"""How the tensors of a table are cut into the programs of its launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..step import grad_norm
from ..step.grad_norm import GradCut
from ..step.routing import State
from ..tensors.layout import Layout
from ..tensors.sharding import Spread, local
from . import backend
from .backend import GradVariant
from .pointer_tables import addresses_of, as_tensor, column, is_aligned, owners, real_numel
from .row_launcher import Kind
from .tuning import Config

if TYPE_CHECKING:
    from ..optimizer import FusedStep


class Look(NamedTuple):
    """How a parameter's latest gradient was, for steps in which it is missing."""

    param: Layout | None  # the parameter's then; shards of DTensors, here and below
    grad: Layout | None  # None of a sparse gradient
    is_taken: bool = False  # whether a kernel takes the parameter
    kind: Kind | None = None  # of one that is updated from by rows
    is_aligned: bool = True


class Entry(NamedTuple):
    """One parameter that the kernels take."""

    position: int  # among all of the optimizer's
    param: Tensor
    shard: Tensor  # the parameter, or of a DTensor what this rank holds
    grad: Tensor | None  # likewise; None where it is missing
    look: Look  # of the gradient, be it missing or not
    spread: Spread
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


class Cut(NamedTuple):
    """What one update launch updates, cut into programs."""

    variant: backend.Variant
    config: Config
    owners: Tensor  # int32, one a program: the row of its tensor
    n_bytes: int


class Cuts(NamedTuple):
    """The table of rows, on the host, and the launches that read it."""

    rows: Tensor
    updates: list[Cut]
    grads: list[GradCut]


def cut(optimizer: FusedStep, entries: Sequence[Entry], states: Sequence[State]) -> Cuts:
    """Cut the entries of one device."""
    numels = [real_numel(entry.shard) for entry in entries]
    updated = [
        [local(s[name]) for name in e.state_names] for e, s in zip(entries, states, strict=True)
    ]
    addresses = [addresses_of([e.shard, *u]) for e, u in zip(entries, updated, strict=True)]
    members: dict[backend.Variant, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        if numels[i]:
            members[_variant(optimizer, entry, updated[i], addresses[i])].append(i)
    first = [0] * len(entries)
    updates = []
    for variant, indices in members.items():
        sizes = [numels[i] for i in indices]
        config = backend.config(variant, sizes, entries[0].shard.device)
        counts = [-(-size // config.chunk) for size in sizes]
        for i, place in zip(indices, accumulate(counts, initial=0), strict=False):
            first[i] = place
        n_bytes = variant.bytes_per_element * sum(sizes)
        updates.append(Cut(variant, config, owners(indices, counts), n_bytes))
    spreads = [entry.spread for entry in entries]
    variants = [_grad_variant(entry) for entry in entries]
    norm_first, grads = grad_norm.cut(numels, variants, spreads, entries[0].shard.device)
    rows: list[int] = []
    for i, entry in enumerate(entries):
        rows += backend.row(numels[i], entry.group, first[i], addresses[i], norm_first[i])
    return Cuts(as_tensor(column("q", rows)).view(-1, backend.ROW_WIDTH), updates, grads)


def _variant(
    optimizer: FusedStep, entry: Entry, states: Sequence[Tensor], addresses: Sequence[int]
) -> backend.Variant:
    grad = _grad_variant(entry)
    return backend.Variant(
        flags=entry.flags,
        n_states=len(states),
        param_dtype=backend.STORAGE_DTYPES[entry.shard.dtype],
        grad_dtype=grad.dtype,
        state_dtype=backend.STORAGE_DTYPES[(states[0] if states else entry.shard).dtype],
        aligned=grad.aligned and is_aligned(addresses),
        reads_step=not entry.flags.isdisjoint(optimizer._step_flags),
    )


def _grad_variant(entry: Entry) -> GradVariant:
    assert entry.look.grad is not None
    aligned = entry.reordered or entry.look.is_aligned
    return GradVariant(backend.STORAGE_DTYPES[entry.look.grad.dtype], aligned)
