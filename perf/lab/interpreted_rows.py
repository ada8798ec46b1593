"""What a step of sparse gradients loads and stores, by what it is of: interpreted.

Only with TRITON_INTERPRET. What torch's sort of the keys moves is not in it, nor are atomic
additions, of 4 bytes a partial sum.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from lab.audit import Measures
from lab.compiled import rule_and_flags, short
from lab.row_kernels import OPTIMIZERS, config
from lab.traffic import OTHER, Traffic, watched
from triton_optim.launch import row_launcher, tuning
from triton_optim.launch.launcher import Launch
from triton_optim.launch.row_launcher import RowLaunch, dtype_name

ARCHITECTURE = "sm_90"  # whose block sizes the steps have
BATCHES = {16: 1024, 64: 512, 256: 128}  # ids by width: some programs of each
DTYPES = (torch.float32, torch.bfloat16)
ROWS = 1000
HOT = 7  # a row that many programs meet
LONG = 131_072  # ids, as many as the larger batches of bench_step.py: longer chunks, fewer sums
LONG_WIDTH = 64
KINDS = ("uniform", "hot", "long")
SCRATCH = {"keys_ptr": "keys", "permutation_ptr": "order", "partials_ptr": "partials"}


def cases() -> list[tuple[Any, ...]]:
    """The arguments of every `measure`."""
    return [
        (*optimizer, dtype, width, kind)
        for optimizer, dtype, width, kind in product(OPTIMIZERS, DTYPES, BATCHES, KINDS)
        if kind != "long" or width == LONG_WIDTH
    ]


def measure(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype, width: int, kind: str
) -> tuple[str, Measures]:
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
        patch.object(row_launcher, "config", lambda variant, _: config(ARCHITECTURE, variant)),
        patch.object(tuning, "PROGRAMS", programs),
    ):
        optimizer = getattr(triton_optim, name)([param], **kwargs, fused=True)
        _give(param, ids[:1])
        optimizer.step()  # which makes the state
        _give(param, ids)
        run = _Watched(optimizer, param)
        with patch.object(Launch, "run", run.launch(Launch.run)), watched(run.traffic.count):
            optimizer.step()
    rule, (group, *_) = optimizer._current_rule(), optimizer.param_groups
    update = rule_and_flags(rule.row_function.__name__, rule.active_flags(group))
    return f"{update} {short(dtype_name(dtype))} {width} {kind}", run.measures(ids)


def _give(param: Parameter, ids: Tensor) -> None:
    values = torch.randn(len(ids), *param.shape[1:]).to(param.dtype)
    param.grad = torch.sparse_coo_tensor(ids[None], values, param.shape, check_invariants=False)


class _Watched:
    """The accesses of the step to come."""

    def __init__(self, optimizer: Any, param: Parameter) -> None:
        assert param.grad is not None
        state = optimizer.state[param]
        self.traffic, self.programs = Traffic(), 0
        self._values = param.grad._values()
        self._written = {
            "param": param.detach(),
            **{name: value for name, value in state.items() if name != "step"},
        }
        self._known = [
            ("values", self._values), ("keys", param.grad._indices()), *self._written.items()
        ]  # fmt: skip

    def launch(self, run: Callable[..., None]) -> Callable[..., None]:
        """`Launch.run`, with what it is given known."""

        def known(launch: Launch, **changed: Any) -> None:
            arguments = {**launch.arguments, **changed}
            scratch = [(kind, arguments.get(name)) for name, kind in SCRATCH.items()]
            given = [(kind, tensor) for kind, tensor in scratch if tensor is not None]
            self.traffic.tensors = [*given, *self._known]
            self.programs = launch.grid[0] if isinstance(launch, RowLaunch) else 0
            run(launch, **changed)

        return known

    def measures(self, ids: Tensor) -> Measures:
        traffic, rows = self.traffic, ids.unique()
        every = torch.arange(len(self._values))
        astray = traffic.astray("values", False, self._values, every)
        astray += traffic.astray("values", True, self._values, every[:0])
        floor = self._values.nbytes
        for kind, tensor in self._written.items():
            floor += 2 * len(rows) * tensor.nbytes // len(tensor)
            astray += sum(traffic.astray(kind, stores, tensor, rows) for stores in (False, True))
        return {
            "ids": len(ids),
            "rows": len(rows),
            "width": self._values.shape[1],
            "programs": self.programs,
            "floor": floor,
            "moved": traffic.of("values", *self._written),
            "astray": astray,
            **{kind: traffic.of(kind) for kind in SCRATCH.values()},
            "tables": traffic.of(OTHER),
        }
