"""What a step costs a rank of `fully_shard`, computed from shapes and committed host times.

Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from lab import suites, tables
from lab.host_rows import DTENSOR, FRESH, Row, found
from lab.rows import OURS
from lab.rules import RULES, STORAGES, Storage, bytes_kept, bytes_per_param
from lab.suites import Layout

# NVIDIA H100 Tensor Core GPU datasheet, SXM: the peak, which no kernel reaches.
BANDWIDTH = 3.35e12  # bytes/s
MEMORY = 80e9  # bytes
RANKS = (1, 8, 64, 512, 2048)
MODELS = (suites.llama3_8b, suites.llama3_70b, suites.qwen3_30b_a3b)
RULE = next(rule for rule in RULES if rule.name == "rmsprop")
BOTH = [s for s in STORAGES if s.name in ("float32", "bfloat16+float32")]
FLOAT32 = BOTH[0]
ALIGNMENT = 16  # bytes, of a launch's vector loads


class Share(NamedTuple):
    """What rank 0, which has the largest shard of every tensor, has to step."""

    params: int
    tensors: int  # empty ones too: the host looks at them all
    launches: int
    all_reduces: int

    @classmethod
    def of(cls, layout: Layout, ranks: int, item_size: int) -> Share:
        """Of a model whose layers are a `fully_shard` each, the rest another, in one mesh dim.

        Args:
            layout: the model.
            ranks: in that mesh dim.
            item_size: bytes of an element of a gradient.
        """
        units: dict[str, list[int]] = defaultdict(list)
        for name, shape in suites.shard(layout, ranks).tensors:
            layer, _, rest = name.partition(".")
            units[layer if rest else ""].append(math.prod(shape))
        aligned = {
            start * item_size % ALIGNMENT == 0
            for sizes in units.values()
            # A unit's gradients lie side by side in the output of its reduce-scatter.
            for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False)
            if size
        }
        params = sum(sum(sizes) for sizes in units.values())
        return cls(params, len(layout.tensors), len(aligned), int(ranks > 1))


def floor_us(params: int, storage: Storage) -> float:
    return 1e6 * params * bytes_per_param(RULE, storage) / BANDWIDTH


def table(rows: Sequence[Row]) -> str:
    """The table of perf/README.md, and from how many ranks on the host takes longer."""
    stepped = {"rule": RULE.name, "params": DTENSOR, "gradients": FRESH, "groups": 1}
    measured = found(rows, **stepped, implementation=OURS)
    row = max(measured, key=lambda row: row.tensors)
    cost = row.median / row.tensors  # us
    layouts = [model() for model in MODELS]
    lines = [_line(layout, ranks, cost) for layout in layouts for ranks in RANKS]
    longer = [f"{layout.name} from {_host_bound(layout, cost)}" for layout in layouts]
    head = ["model", "ranks", "tensors", "elements", "above an even share"]
    for storage in BOTH:
        head += [f"MB, {storage.name}", "ms at the peak"]
    head += ["host ms", "launches", "all-reduces"]
    text = (
        f"Host time: {cost:.2f} us a tensor, measured over {row.tensors:,} DTensors on "
        f"{row.machine}. It exceeds the time at the peak, float32, of {'; '.join(longer)} ranks on."
    )
    return f"{tables.markdown(head, lines)}\n\n{tables.paragraph(text)}"


def _line(layout: Layout, ranks: int, cost: float) -> list[str]:
    shares = {storage: Share.of(layout, ranks, storage.param.itemsize) for storage in BOTH}
    share = shares[FLOAT32]
    excess = 100 * (share.params * ranks / layout.params - 1)
    numbers = (f"{number:,}" for number in (ranks, share.tensors, share.params))
    cells = [layout.name, *numbers, f"{excess:.1f} %"]
    for storage in BOTH:
        n_bytes = share.params * bytes_per_param(RULE, storage)
        mark = " *" if share.params * bytes_kept(RULE, storage) > MEMORY else ""
        cells += [f"{n_bytes / 1e6:,.1f}{mark}", f"{floor_us(share.params, storage) / 1e3:,.3f}"]
    launches = " / ".join(dict.fromkeys(f"{s.launches} + {s.launches}" for s in shares.values()))
    return [*cells, f"{cost * share.tensors / 1e3:,.2f}", launches, f"{share.all_reduces}"]


def _host_bound(layout: Layout, cost: float) -> int:
    """The fewest ranks, a power of two, of which the host takes longer than memory at its peak."""
    ranks, host_us, size = 1, cost * len(layout.tensors), FLOAT32.param.itemsize
    while host_us <= floor_us(Share.of(layout, ranks, size).params, FLOAT32):
        ranks *= 2
    return ranks
