"""Several processes train as one does: DDP, FSDP2, tensor parallel, ZeRO, and their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from cases import Case, every_state, new_param
from distributed_scenarios import SCENARIOS

SIZES = (2, 4, 1)  # of one world after another: the last two go on from checkpoints
RUNS = [
    f"{scenario.name}-{size}" for size in SIZES for scenario in SCENARIOS if size in scenario.sizes
]


@cache
def _outcomes(backend: str, *sizes: int) -> dict[str, str | None]:
    helpers = Path(__file__).parents[1] / "helpers"
    paths = [str(helpers), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if backend == "gloo":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(helpers / "distributed_scenarios.py"), backend, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, str | None] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("run", RUNS)
def test_on_the_cpu(run: str) -> None:
    outcome = _outcomes("gloo", *SIZES)[run]
    assert outcome is None, outcome


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_on_gpus(run: str) -> None:
    gpus = torch.cuda.device_count()
    size = int(run.rpartition("-")[2])
    if gpus < max(size, 2):
        pytest.skip(f"needs {max(size, 2)} GPUs")
    outcome = _outcomes("nccl", *(size for size in SIZES if size <= gpus))[run]
    assert outcome is None, outcome


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipping"])
@every_state
def test_keys_of_a_state_dict_are_torchs(case: Case, kwargs: dict[str, float]) -> None:
    """No key more: torch.distributed.checkpoint would look for it in a checkpoint of torch's."""
    keys = []
    for make in (partial(case.ours, **kwargs), case.theirs):
        optimizer = make([new_param(3), new_param(2, 2)])
        optimizer.step()
        state = optimizer.state_dict()
        entries = [*state["state"].values(), *state["param_groups"]]
        keys.append([list(entry) for entry in (state, *entries)])
    assert keys[0] == keys[1]
