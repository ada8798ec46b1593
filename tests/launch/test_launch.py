"""How compiled kernels are launched, shown without a GPU; and every chunking of a launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import CASES, DEVICE, Case, Tensors, each
from compiled_scenarios import SCENARIOS

from triton_optim.launch import backend
from triton_optim.launch.launcher import checked_grid
from triton_optim.launch.tuning import Config


@cache
def _outcomes() -> dict[str, str | None]:
    tests = Path(__file__).parents[1]
    paths = [str(tests / "helpers"), str(tests.parent / "perf"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(tests / "helpers/compiled_scenarios.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    outcomes: dict[str, str | None] = json.loads(done.stdout)
    return outcomes


@pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_compiled(scenario: str) -> None:
    """On a GPU that is not there: see perf/lab/dry_gpu.py."""
    assert _outcomes()[scenario] is None, _outcomes()[scenario]


@pytest.mark.parametrize(
    "config",
    [Config(64, 1, blocks=2), Config(128, 4, blocks=3, num_stages=3, eviction="evict_first")],
    ids=str,
)
@each(CASES[::3])
def test_the_chunking_of_a_launch_changes_no_bit(
    case: Case, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cut = Tensors(torch.bfloat16), Tensors(torch.bfloat16)
    expected.train(case.ours(expected.params), 2)
    monkeypatch.setattr(backend, "config", lambda *_: config)
    cut.train(case.ours(cut.params), 2)
    assert_same_bits(cut.params, expected.params)


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "warns"),
    [("3.6.0", "2.4.1", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.10.0", False)],
)
def test_an_interpreter_that_would_fail(of_triton: str, of_numpy: str, warns: bool) -> None:
    context: Any = pytest.warns(UserWarning, match="numpy<2") if warns else nullcontext()
    with context:
        backend.check_interpreter(of_triton, of_numpy)


def test_more_programs_than_a_launch_has() -> None:
    """Triton's launcher drops them in silence."""
    assert checked_grid(2**31 - 1, 1) == (2**31 - 1, 1, 1)
    for x, y in ((2**31, 1), (2**16, 2**15), (1, 2**16)):
        with pytest.raises(RuntimeError, match=f"a launch of {x} times {y} programs"):
            checked_grid(x, y)
