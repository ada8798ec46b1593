"""What a step over sparse gradients loads and stores, by what it is about: interpreted.

    python -m lab.row_traffic sm_90

prints one JSON list, an item a step. `perf/audit_rows.py` runs it, in a process of its own: Triton
either interprets or compiles. What torch's sort of the keys moves is not in it, nor are atomic
additions, of 4 bytes a partial sum.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from lab.row_kernels import OPTIMIZERS, config
from lab.traffic import Access, watched
from triton_optim.launch import row_launcher, tuning
from triton_optim.launch.launcher import Launch
from triton_optim.launch.row_launcher import RowLaunch, dtype_name

BATCHES = {16: 1024, 64: 512, 256: 128}  # ids by width: some programs of each
DTYPES = (torch.float32, torch.bfloat16)
ROWS = 1000
HOT = 7  # a row that many programs meet
LONG = 131_072  # ids, as many as bench_sparse.py's larger batches have: longer chunks, fewer sums
LONG_WIDTH = 64
KINDS = ("uniform", "hot", "long")
SCRATCH = {"keys_ptr": "keys", "order_ptr": "order", "partials_ptr": "partials"}


class Step(NamedTuple):
    """What one step moved, in bytes; the keys are made by one launch and read by the other."""

    name: str
    ids: int
    rows: int  # touched
    width: int
    programs: int  # of the update
    floor: int  # values once, and touched rows in and out
    moved: int  # of these
    astray: int  # of these elements, those that were not moved exactly once
    keys: int  # with the ids they are made of
    order: int
    partials: int
    tables: int

    @property
    def beside(self) -> int:
        """Bytes that are neither of rows nor of sums of them."""
        return self.keys + self.order + self.tables

    @property
    def total(self) -> int:
        return self.moved + self.partials + self.beside

    @property
    def over(self) -> float:
        """Percent above the floor."""
        return 100 * self.total / self.floor - 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", help="whose block sizes are used, such as sm_90")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    args = parser.parse_args()
    steps = [
        (*optimizer, dtype, width, kind)
        for optimizer, dtype, width, kind in product(OPTIMIZERS, DTYPES, BATCHES, KINDS)
        if kind != "long" or width == LONG_WIDTH
    ]
    first, every = args.part
    measured = [measure(args.architecture, *step) for step in steps[first::every]]
    print(json.dumps([step._asdict() for step in measured]))


def measure(
    architecture: str,
    name: str,
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    width: int,
    kind: str,
) -> Step:
    """An optimizer's second step, with programs of the size that a GPU is given.

    Args:
        kind: one of KINDS. All but a quarter of "hot" are drawn uniformly, some twice.
    """
    torch.manual_seed(0)
    n_ids = BATCHES[width]
    ids = torch.randint(ROWS, (n_ids,))
    ids[: n_ids // 4 if kind == "hot" else 0] = HOT
    ids = ids[torch.randperm(n_ids)]
    param = Parameter(torch.randn(ROWS, width).to(dtype))
    programs = tuning.PROGRAMS * n_ids // LONG if kind == "long" else tuning.PROGRAMS
    with (
        patch.object(row_launcher, "config", lambda variant, _: config(architecture, variant)),
        patch.object(tuning, "PROGRAMS", programs),
    ):
        optimizer = getattr(triton_optim, name)([param], **kwargs, fused=True)
        _give(param, ids[:1])
        optimizer.step()  # which makes the state
        _give(param, ids)
        tally = _Tally(optimizer, param)
        with patch.object(Launch, "run", tally.launch(Launch.run)), watched(tally.watch):
            optimizer.step()
    storage = dtype_name(dtype).replace("float", "f")
    flags = "+".join(sorted(optimizer.rule.active_flags(optimizer.param_groups[0]))) or "-"
    rule = optimizer.rule.row_function.__name__.removesuffix("_rule")
    return tally.step(f"{rule} {flags} {storage} {width} {kind}", ids)


def _give(param: Parameter, ids: Tensor) -> None:
    values = torch.randn(len(ids), *param.shape[1:]).to(param.dtype)
    param.grad = torch.sparse_coo_tensor(ids[None], values, param.shape, check_invariants=False)


class _Tally:
    """Accesses of the step to come, by what they are about."""

    def __init__(self, optimizer: Any, param: Parameter) -> None:
        assert param.grad is not None
        state = optimizer.state[param]
        self.values, self.ids, self.programs = param.grad._values(), param.grad._indices(), 0
        self.written = [param, *(value for name, value in state.items() if name != "step")]
        rows = {f"row {i}": tensor for i, tensor in enumerate(self.written)}
        self._tensors: dict[str, Tensor] = {"values": self.values, "keys": self.ids, **rows}
        self._spans: list[tuple[int, int, str]] = []
        self._bytes: dict[str, int] = defaultdict(int)
        self._addresses: dict[tuple[str, bool], list[Any]] = defaultdict(list)

    def launch(self, run: Any) -> Any:
        """`Launch.run`, with what it is given known."""

        def known(launch: Launch, **changed: Any) -> None:
            arguments: Mapping[str, Any] = {**launch.arguments, **changed}
            given = [(kind, arguments.get(name)) for name, kind in SCRATCH.items()]
            tensors = [*((kind, t) for kind, t in given if t is not None), *self._tensors.items()]
            self._spans = [(t.data_ptr(), t.data_ptr() + t.nbytes, kind) for kind, t in tensors]
            self.programs = launch.grid[0] if isinstance(launch, RowLaunch) else 0
            run(launch, **changed)

        return known

    def watch(self, access: Access) -> None:
        if not access.addresses.size:
            return
        first = int(access.addresses.flat[0])
        kind = next((kind for a, b, kind in self._spans if a <= first < b), "tables")
        self._bytes[kind] += access.n_bytes
        self._addresses[kind, access.stores].append(access.addresses.ravel())

    def step(self, name: str, ids: Tensor) -> Step:
        rows = ids.unique()
        floor = self.values.nbytes
        astray = self._astray("values", False, self.values, torch.arange(len(self.values)))
        for i, tensor in enumerate(self.written):
            row_bytes = tensor.nbytes // len(tensor)
            floor += 2 * len(rows) * row_bytes
            astray += sum(
                self._astray(f"row {i}", stores, tensor, rows) for stores in (False, True)
            )
        astray += sum(map(np.size, self._addresses["values", True]))
        moved = sum(n for kind, n in self._bytes.items() if kind == "values" or "row " in kind)
        of = partial(self._bytes.__getitem__)
        return Step(
            name, len(ids), len(rows), self.values.shape[1], self.programs, floor, moved, astray,
            of("keys"), of("order"), of("partials"), of("tables"),
        )  # fmt: skip

    def _astray(self, kind: str, stores: bool, tensor: Tensor, rows: Tensor) -> int:
        """Elements that were not accessed, were though in no such row, or more than once."""
        size, width = tensor.element_size(), tensor.numel() // len(tensor)
        places = (rows[:, None] * width + torch.arange(width)).numpy().ravel()
        expected = tensor.data_ptr() + places.astype(np.uint64) * np.uint64(size)
        seen = np.concatenate([np.empty(0, np.uint64), *self._addresses[kind, stores]])
        found, counts = np.unique(seen, return_counts=True)
        return int((counts - 1).sum()) + np.setxor1d(found, expected).size


if __name__ == "__main__":
    main()
