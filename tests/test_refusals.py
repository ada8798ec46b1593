"""What is refused before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BLOCK, DEVICE, STATEFUL_CASES, Case, assert_same_bits, new_param, twins_of
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim import runtime

every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)


def test_rmsprop_refuses_sparse_gradients_and_writes_nothing() -> None:
    dense, other = new_param(4), new_param(4, 3)
    other.grad = torch.ones(4, 3, device=DEVICE).to_sparse(1)
    before = copy.deepcopy([dense, other])
    optimizer = triton_optim.RMSprop([dense, other])
    with pytest.raises(RuntimeError, match="RMSprop does not support sparse gradients"):
        optimizer.step()
    assert_same_bits([dense, other], before)
    assert dense not in optimizer.state


@every_state
@pytest.mark.parametrize("kind", ["sparse", "strided", "subclass"])
def test_fused_true_is_an_error_where_there_is_no_kernel(case: Case, kind: str) -> None:
    class Subclass(Parameter):
        pass

    fine, param = new_param(4), new_param(6, 4)
    if kind == "sparse":
        param.grad = torch.ones(6, 4, device=DEVICE).to_sparse(1)
    elif kind == "strided":
        param = Parameter(torch.randn(6, 8, device=DEVICE)[:, ::2])
        param.grad = torch.ones(6, 4, device=DEVICE)
    else:
        param = Subclass(param.data)
        param.grad = torch.ones(6, 4, device=DEVICE)
    optimizer = case.ours([fine, param], fused=True)
    before = copy.deepcopy((fine, param, optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"`fused=True`.*parameter 1 of group 0.*leave `fused`"):
        optimizer.step()
    assert_same_bits((fine, param, optimizer.state_dict()), before)


DAMAGES: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "short": (lambda t: t.flatten()[:-1].clone(), r"has shape \(11,\)"),
    "integer": (lambda t: t.int(), "is torch.int32"),
    "sparse": (lambda t: t.to_sparse(), "is torch.sparse_coo"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64"),
    "missing": (lambda t: None, "is None"),
    # Adagrad's state follows its parameter instead
    "device": (lambda t: t.to("meta"), "is on meta"),
}


@pytest.mark.parametrize(
    ("case", "damage"),
    [(case, damage) for case in STATEFUL_CASES[2:] for damage in DAMAGES
     if (case.optimizer, damage) != ("Adagrad", "device")],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_bad_state_is_an_error_and_nothing_is_written(case: Case, damage: str) -> None:
    key = "sum" if case.optimizer == "Adagrad" else "square_avg"
    inflict, message = DAMAGES[damage]
    params = [new_param(5), new_param(3, 4), new_param(BLOCK + 1)]
    optimizer = case.ours([("a", params[0]), ("b", params[1]), ("c", params[2])])
    optimizer.step()
    optimizer.state[params[1]][key] = inflict(optimizer.state[params[1]][key])
    before = [p.detach().clone() for p in params]
    steps = [float(optimizer.state[p]["step"]) for p in params]
    others = copy.deepcopy([optimizer.state[p] for p in (params[0], params[2])])
    with pytest.raises(RuntimeError, match=rf"'{key}' of parameter 1 \('b'\) of group 0 {message}"):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)
    assert [float(optimizer.state[p]["step"]) for p in params] == steps
    assert_same_bits([optimizer.state[p] for p in (params[0], params[2])], others)


def test_a_checkpoint_whose_sum_is_one_element_short() -> None:
    source, target = new_param(100), new_param(100)
    saved = triton_optim.Adagrad([source])
    saved.step()
    checkpoint = copy.deepcopy(saved.state_dict())
    checkpoint["state"][0]["sum"] = checkpoint["state"][0]["sum"][:-1].clone()
    optimizer = triton_optim.Adagrad([target])
    optimizer.load_state_dict(checkpoint)
    before = copy.deepcopy((target, optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"'sum' of parameter 0 of group 0 has shape \(99,\)"):
        optimizer.step()
    assert_same_bits((target, optimizer.state_dict()), before)


@pytest.mark.parametrize("step", [None, 3, torch.zeros(2), torch.zeros((), dtype=torch.cfloat)])
def test_bad_step_is_an_error(step: Any) -> None:
    param = new_param(5)
    optimizer = triton_optim.RMSprop([param])
    optimizer.step()
    optimizer.state[param]["step"] = step
    with pytest.raises(RuntimeError, match="'step' of parameter 0 of group 0"):
        optimizer.step()


@every_state
def test_gradient_of_another_shape_forced_through_data(case: Case) -> None:
    """A slice has the address that the whole gradient had."""
    params = [new_param(5), new_param(BLOCK + 1)]
    optimizer = case.ours(params)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()))
    assert params[1].grad is not None
    params[1].grad.data = params[1].grad.data[:-1]
    with pytest.raises(RuntimeError, match="gradient of parameter 1 of group 0"):
        optimizer.step()
    assert_same_bits([params[0], optimizer.state_dict()], [before[0][0], before[1]])


@every_state
def test_a_parameter_that_shrinks_at_its_address(case: Case) -> None:
    """Its old gradient is still there, and the kernel must not follow it past the end."""
    param = new_param(BLOCK + 1)
    optimizer = case.ours([param])
    optimizer.step()
    whole, before = param.data, param.data.clone()
    param.data = param.data[:3]
    with pytest.raises(RuntimeError, match="gradient of parameter 0 of group 0"):
        optimizer.step()
    assert_same_bits(whole, before)


@pytest.mark.parametrize("case", STATEFUL_CASES[1:], ids=lambda case: case.name)
def test_state_that_shrinks_at_its_address(case: Case) -> None:
    param = new_param(BLOCK + 1)
    optimizer = case.ours([param])
    optimizer.step()
    before = param.detach().clone()
    for key, value in optimizer.state[param].items():
        if key != "step":
            value.data = value.data[:3]
    with pytest.raises(RuntimeError, match=r"of parameter 0 of group 0 has shape \(3,\)"):
        optimizer.step()
    assert_same_bits(param.detach(), before)


@pytest.mark.parametrize("case", STATEFUL_CASES[1:], ids=lambda case: case.name)
@pytest.mark.parametrize("when", ["hyperparameter", "launch"])
def test_a_first_step_that_fails_makes_no_state(
    case: Case, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = twins_of(new_param(5))
    ours, theirs = case.ours([p]), case.theirs([q])
    before = copy.deepcopy((p, ours.state_dict()["state"]))
    with monkeypatch.context() as patch:
        if when == "launch":
            patch.setattr(runtime, "launch", lambda *_: 1 / 0)
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
