"""`triton_optim.testing.check` passes what is right, and names what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lion import Lion, lion_reference
from torch import Tensor

import triton_optim
from triton_optim.options import Group
from triton_optim.rule import State
from triton_optim.step import conditions
from triton_optim.testing import check, compiled
from triton_optim.testing.compiled import Compiled, Usage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_blocks() -> None:
    """Blocks as a user has them: with the small ones of other tests this takes minutes."""


class WithoutReference(Lion):
    rule = replace(Lion.rule, reference=None)


def _no_decay(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    lion_reference(param, grad, state, {**group, "weight_decay": 0.0})


class NoDecay(Lion):
    rule = replace(Lion.rule, reference=_no_decay)


def _state_alone(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    lion_reference(param, grad, state, group)
    state["exp_avg"].mul_(1.001)


def _late(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    late = state["step"] > 5
    lion_reference(param, grad, state, {**group, "weight_decay": 0.0} if late else group)


class Late(Lion):
    rule = replace(Lion.rule, reference=_late)


class AnotherState(Lion):
    rule = replace(Lion.rule, reference=_state_alone)


class Forgetful(Lion):
    def state_dict(self) -> dict[str, Any]:
        held = super().state_dict()
        held["state"] = {}
        return held


class Unclipped(Lion):
    max_grad_norm = None


def test_lion(capsys: pytest.CaptureFixture[str]) -> None:
    check(Lion, lr=1e-3, weight_decay=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Lion(lr=0.001, weight_decay=0.1): largest error after 7 steps"
    rows = [line.split() for line in lines]
    moved = {tuple(row[:2]): row[-1] for row in rows if len(row) == 6}
    assert moved["bfloat16", "bfloat16"] == "10"
    assert moved["float32", "bfloat16"] == "18"
    on_gpus = [row for row in rows if len(row) == 5 and row[0] in compiled.ARCHITECTURES]
    assert len(on_gpus) == 8
    assert {(spills, bits) for *_, spills, bits in on_gpus} == {("0", "128")}


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"),
    [
        (triton_optim.RowwiseAdagrad, {"lr": 0.1}),
        (triton_optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
        (triton_optim.RMSprop, {"lr": 0.01, "sparse": "lazy"}),
        (triton_optim.SGD, {"lr": 0.1, "max_grad_norm": 0.1, "skip_nonfinite": True}),
        (triton_optim.Adam, {"lr": torch.tensor(1e-3), "betas": (torch.tensor(0.9),) * 2}),
        (triton_optim.Adam, {"lr": 1.0}),
    ],
)
def test_built_in(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    check(optimizer_class, compiled=False, **kwargs)


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "message"),
    [
        (NoDecay, {"weight_decay": 0.1}, r"element 0 of parameter 0 of shape \(\) in float32 errs"),
        (Late, {"weight_decay": 0.1}, r"element 0 of parameter 0 of shape \(\) in float32 errs"),
        (AnotherState, {}, r"of state 'exp_avg' of parameter 3 of shape \(7, 9\) in float64 errs"),
        (Forgetful, {}, r"state 'step' of parameter 0 of shape \(\) is another after state_dict"),
        (Unclipped, {}, r"in float32, clipped to a norm, errs by"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(optimizer_class: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(optimizer_class, compiled=False, lr=0.1, **kwargs)


class Narrow(Lion):
    rule = replace(Lion.rule, doubles=False)


class NarrowWithoutDecay(Lion):
    rule = replace(NoDecay.rule, doubles=False)


@pytest.mark.parametrize(
    ("optimizer_class", "hints"), [(Narrow, True), (NarrowWithoutDecay, False)]
)
def test_scalars_that_lose_digits(optimizer_class: Any, hints: bool) -> None:
    """Named where float64 parameters are right."""
    with pytest.raises(AssertionError) as error:
        check(optimizer_class, compiled=False, lr=0.1, beta2=0.9999, weight_decay=0.1)
    assert ("1 - beta lose digits" in str(error.value)) == hints


def test_a_scaler_that_is_not_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step under a found_inf happens after all."""
    read = conditions.as_scalar_tensor

    def without_found_inf(value: object, name: str) -> Tensor | None:
        return None if name == "found_inf" else read(value, name)

    monkeypatch.setattr(conditions, "as_scalar_tensor", without_found_inf)
    with pytest.raises(AssertionError, match="under a GradScaler that skips a step"):
        check(Lion, compiled=False)


def test_spills_and_narrow_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Compiled("sm_90", "float32", Usage(255, 8), 128),
            Compiled("gfx942", "bfloat16", Usage(40, 0), 32)]  # fmt: skip
    monkeypatch.setattr(compiled, "compile_updates", lambda *_: rows)
    with pytest.raises(AssertionError) as error:
        check(Lion)
    assert str(error.value).splitlines() == [
        "for float32 on sm_90 a kernel spills 8 bytes a thread",
        "for bfloat16 on gfx942 a kernel loads 32 bits at a time",
    ]


def test_what_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RuntimeError, match="WithoutReference has nothing to be compared with; give"
    ):
        check(WithoutReference, compiled=False)
    with pytest.raises(ValueError, match="takes no stochastic_rounding; leave it out"):
        check(triton_optim.AdamW, stochastic_rounding=True)
    with pytest.raises(AssertionError, match="no kernel was launched"):
        check(Lion, compiled=False, fused=False)
    monkeypatch.setattr("triton_optim.launch.backend.DEVICE_TYPE", None)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before"):
        check(Lion)


def test_where_the_class_cannot_be_imported() -> None:
    class Local(Lion):
        pass

    with pytest.raises(RuntimeError, match="could not be compiled"):
        check(Local)


PROGRAM = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import triton_optim.testing
from lion import Lion

class Own(Lion):
    pass

if __name__ == "__main__":
    triton_optim.testing.check(Own)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles in its own process there")
def test_a_program_checks_its_own_class(tmp_path: Path) -> None:
    """One that interprets by itself."""
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests/helpers")))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(tmp_path / "program.py")]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "Own(): largest error" in printed.stdout
    assert "gfx942" in printed.stdout
