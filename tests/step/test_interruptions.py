"""Exceptions in the middle of things: the optimizer goes on from where its tensors stand."""

from __future__ import annotations

import copy
import linecache
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from assertions import assert_same_bits, raises
from cases import (
    BLOCK,
    DEVICE,
    STATEFUL_CASES,
    Case,
    every_state,
    new_param,
    two_copies,
    with_state,
)
from guarded_memory import guarded
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import Launch

# A signal is not noticed between the start of a `finally` and the end of its first call.
CLEANUP = {"torch.set_grad_enabled(enabled)", "self.param_groups = groups"}
HOST = str(Path(triton_optim.__file__).parent)


def _interrupted(run: Callable[[], object], done: set[object]) -> bool:
    """Call `run`, with a KeyboardInterrupt at the first line of host code that is not `done` yet.

    A line counts as two: when it is reached first, and again, as in a loop's second round.

    Returns:
        Whether there was such a line.
    """
    reached: Counter[tuple[object, int]] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(HOST) or "kernels" in name:
            return None
        if event == "line" and linecache.getline(name, frame.f_lineno).strip() not in CLEANUP:
            line = (frame.f_code, frame.f_lineno)
            reached[line] += 1
            if reached[line] < 3 and (line, reached[line]) not in done:
                done.add((line, reached[line]))
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def _setting(case: Case) -> tuple[Any, list[Parameter], list[Tensor]]:
    """Two parameters that take a launch each, and gradients for three steps."""
    generator = torch.Generator().manual_seed(0)

    def draw(offset: int) -> Tensor:
        values = torch.randn(3, generator=generator, dtype=torch.float64)
        return guarded(values.to(DEVICE), offset)

    params = [Parameter(draw(0)), Parameter(draw(1))]
    return case.ours(params), params, [draw(i % 2) for i in range(6)]


def _step(optimizer: Any, params: list[Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


@pytest.mark.parametrize(
    ("case", "first", "restores"),
    [
        *((case, False, False) for case in STATEFUL_CASES),
        *((case, True, False) for case in STATEFUL_CASES[1::2]),  # with and without step counts
        (STATEFUL_CASES[1], False, True),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_interrupted_at_any_line(case: Case, first: bool, restores: bool) -> None:
    """No parameter is half stepped, and the next step is that of a torch that starts there.

    The step that is interrupted has another learning rate; the next one has that or the old one.
    """
    optimizer, params, grads = _setting(case)
    if not first:
        _step(optimizer, params, grads[:2])
    before = [p.detach().clone() for p in params]
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.5 * rate
    _step(optimizer, params, grads[2:4])
    after = [p.detach().clone() for p in params]
    done: set[object] = set()
    interrupted = True
    while interrupted:
        optimizer, params, grads = _setting(case)
        if not first:
            _step(optimizer, params, grads[:2])
        for param, grad in zip(params, grads[2:4], strict=True):
            param.grad = grad
        kept = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = 0.5 * rate
        interrupted = _interrupted(optimizer.step, done)
        if restores:
            optimizer.param_groups[0]["lr"] = kept
        assert torch.is_grad_enabled()
        for param, old, new in zip(params, before, after, strict=True):
            assert torch.equal(param, old) or torch.equal(param, new)
        twins = [Parameter(param.detach().clone()) for param in params]
        other = case.theirs(twins)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        _step(optimizer, params, grads[4:])
        _step(other, twins, grads[4:])
        torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-12)
    assert len(done) > 50


@with_state
@pytest.mark.parametrize("when", ["hyperparameter", "launch"])
def test_a_first_step_that_fails_makes_no_state(
    case: Case, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = two_copies(new_param(5))
    ours, theirs = case.ours([p]), case.theirs([q])
    before = copy.deepcopy((p, ours.state_dict()["state"]))
    with monkeypatch.context() as patch:
        if when == "launch":
            patch.setattr(Launch, "run", lambda self: 1 / 0)
        else:
            ours.param_groups[0]["lr"] = torch.ones(2)
        with pytest.raises((ValueError, ZeroDivisionError)):
            ours.step()
    assert_same_bits((p, ours.state_dict()["state"]), before)
    ours.param_groups[0]["lr"] = case.kwargs["lr"]
    for _ in range(2):
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)


@every_state
@pytest.mark.parametrize("when", ["pre", "closure", "post"])
def test_an_exception_of_the_program(case: Case, when: str) -> None:
    """Before the step nothing has happened, and after it the step counts."""

    def fail(*_: object) -> None:
        raise RuntimeError("the program's own")

    p, q = two_copies(new_param(BLOCK + 1))
    ours, theirs = case.ours([p]), case.theirs([q])
    for optimizer in (ours, theirs):
        optimizer.step()
    hooks = {"pre": ours.register_step_pre_hook, "post": ours.register_step_post_hook}
    if when == "post":
        handle = hooks[when](fail)
        with pytest.raises(RuntimeError, match="the program's own"):
            ours.step()
        theirs.step()
        handle.remove()
    elif when == "pre":
        handle = hooks[when](fail)
        with raises("the program's own", ours, [p]):
            ours.step()
        handle.remove()
    else:
        with raises("the program's own", ours, [p]):
            ours.step(fail)
    for optimizer in (ours, theirs):
        optimizer.step()
    torch.testing.assert_close(p, q)
    assert_same_bits(
        [list(s) for s in ours.state.values()], [list(s) for s in theirs.state.values()]
    )
