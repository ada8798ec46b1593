"""Which way a parameter goes, and what is refused before anything is written."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BLOCK, DEVICE, STATEFUL_CASES, Case, assert_same_bits
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim import runtime

every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)


def _param(*shape: int, **kwargs: Any) -> Parameter:
    param = Parameter(torch.randn(*shape, device=DEVICE, **kwargs))
    param.grad = torch.randn_like(param)
    return param


def _twins(param: Parameter) -> list[Parameter]:
    assert param.grad is not None
    twins = []
    for _ in range(2):
        twin = Parameter(param.detach().clone())
        twin.grad = param.grad.clone()
        twins.append(twin)
    return twins


@every_state
@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": False}])
def test_flags_that_take_torchs_way(
    case: Case, flags: dict[str, bool], launches: list[runtime.Variant]
) -> None:
    p, q = _twins(_param(5))
    ours = case.ours([p], **flags)
    theirs = case.theirs([q])
    for _ in range(2):
        ours.step()
        theirs.step()
    assert launches == []
    torch.testing.assert_close(p, q)


@every_state
def test_differentiable_takes_torchs_way(case: Case) -> None:
    results = []
    for make in (case.ours, case.theirs):
        start = torch.ones(3, device=DEVICE, requires_grad=True)
        lr = torch.tensor(0.25, device=DEVICE, requires_grad=True)
        param = start * 2
        param.grad = torch.full_like(start, 0.5).requires_grad_(False)
        optimizer = make([param], differentiable=True)
        if case.optimizer == "SGD":
            optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        gradients = torch.autograd.grad(param.square().sum(), (start, lr), allow_unused=True)
        results.append((param.detach(), *gradients))
    assert_same_bits(results[0], results[1])


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_beside_dense_ones(name: str, launches: list[runtime.Variant]) -> None:
    kwargs: dict[str, Any] = {"lr": 0.1}
    embeddings = [torch.nn.Embedding(10, 3, sparse=True, device=DEVICE) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    dense = _twins(_param(BLOCK + 1))
    ours, theirs = (
        getattr(module, name)([*embedding.parameters(), param], **kwargs)
        for module, embedding, param in zip(
            (triton_optim, torch.optim), embeddings, dense, strict=True
        )
    )
    for _ in range(3):
        for embedding, optimizer in zip(embeddings, (ours, theirs), strict=True):
            embedding.zero_grad()
            embedding(torch.tensor([1, 2, 2, 7], device=DEVICE)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(embeddings[0].weight, embeddings[1].weight)
    torch.testing.assert_close(*dense)
    assert len(launches) == 3
    assert [float(s["step"]) for s in ours.state.values() if "step" in s] == (
        [3.0, 3.0] if name == "Adagrad" else []
    )


def test_a_sparse_gradient_that_becomes_dense(launches: list[runtime.Variant]) -> None:
    p, q = _twins(_param(4, 3))
    ours, theirs = triton_optim.Adagrad([p]), torch.optim.Adagrad([q])
    for sparse in (True, True, False, False, True, False):
        for param, optimizer in ((p, ours), (q, theirs)):
            grad = torch.ones_like(param).detach()
            param.grad = grad.to_sparse(1) if sparse else grad
            optimizer.step()
        torch.testing.assert_close(p, q)
    assert len(launches) == 3


def test_rmsprop_refuses_sparse_gradients_and_writes_nothing() -> None:
    dense, other = _param(4), _param(4, 3)
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

    fine, param = _param(4), _param(6, 4)
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


@every_state
def test_a_parameter_that_is_not_dense_goes_torchs_way(
    case: Case, launches: list[runtime.Variant]
) -> None:
    bases = [torch.randn(6, 8, device=DEVICE) for _ in range(1)]
    p, q = (Parameter(bases[0].clone()[:, ::2]) for _ in range(2))
    for param in (p, q):
        param.grad = torch.ones(6, 4, device=DEVICE)
    ours, theirs = case.ours([p]), case.theirs([q])
    for _ in range(2):
        ours.step()
        theirs.step()
    assert launches == []
    torch.testing.assert_close(p, q)


def test_conjugate_gradient() -> None:
    p, q = _twins(_param(5, dtype=torch.complex64))
    for param in (p, q):
        assert param.grad is not None
        param.grad = param.grad.conj()
    triton_optim.SGD([p], fused=True).step()
    torch.optim.SGD([q]).step()
    torch.testing.assert_close(p, q)


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
    params = [_param(5), _param(3, 4), _param(BLOCK + 1)]
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
    source, target = _param(100), _param(100)
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
    param = _param(5)
    optimizer = triton_optim.RMSprop([param])
    optimizer.step()
    optimizer.state[param]["step"] = step
    with pytest.raises(RuntimeError, match="'step' of parameter 0 of group 0"):
        optimizer.step()


@every_state
def test_gradient_of_another_shape_forced_through_data(case: Case) -> None:
    """A slice has the address that the whole gradient had."""
    params = [_param(5), _param(BLOCK + 1)]
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
    param = _param(BLOCK + 1)
    optimizer = case.ours([param])
    optimizer.step()
    whole, before = param.data, param.data.clone()
    param.data = param.data[:3]
    with pytest.raises(RuntimeError, match="gradient of parameter 0 of group 0"):
        optimizer.step()
    assert_same_bits(whole, before)


@pytest.mark.parametrize("case", STATEFUL_CASES[1:], ids=lambda case: case.name)
def test_state_that_shrinks_at_its_address(case: Case) -> None:
    param = _param(BLOCK + 1)
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
    p, q = _twins(_param(5))
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


@every_state
def test_a_gradient_that_loses_its_alignment(case: Case, launches: list[runtime.Variant]) -> None:
    p, q = _twins(_param(BLOCK + 1))
    ours, theirs = case.ours([p]), case.theirs([q])
    for offset in (0, 0, 1, 1, 0):
        for param, optimizer in ((p, ours), (q, theirs)):
            assert param.grad is not None
            memory = torch.zeros(BLOCK + 2, device=DEVICE)
            memory[offset : offset + BLOCK + 1] = param.grad
            param.grad = memory[offset : offset + BLOCK + 1]
            optimizer.step()
        torch.testing.assert_close(p, q)
    assert [variant.aligned for variant in launches] == [True, True, False, False, True]


def test_state_in_another_memory_order_is_brought_home() -> None:
    p, q = _twins(_param(2, 3, 4, 5))
    ours, theirs = triton_optim.Adagrad([p]), torch.optim.Adagrad([q])
    for param, optimizer in ((p, ours), (q, theirs)):
        optimizer.step()
        state = optimizer.state[param]
        state["sum"] = state["sum"].to(memory_format=torch.channels_last)
        optimizer.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(ours.state[p]["sum"], theirs.state[q]["sum"])


_LAPTOP = """
import sys, warnings
import torch, triton_optim
from triton_optim import runtime
assert str(runtime.DEVICE_TYPE) == sys.argv[2], runtime.DEVICE_TYPE
name, fused = sys.argv[1], {"True": True, "None": None}[sys.argv[3]]
params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ours = getattr(triton_optim, name)([params[0]], lr=0.1, fused=fused)
    theirs = getattr(torch.optim, name)([params[1]], lr=0.1)
    for _ in range(3):
        for param, optimizer in zip(params, (ours, theirs)):
            param.grad = torch.full((5,), 0.5)
            optimizer.step()
assert torch.equal(*params)
# torch's fused CPU SGD garbles a gradient that is strided unlike its parameter
weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
for weight, optimizer in zip(weights, (ours, theirs)):
    optimizer.add_param_group({"params": [weight]})
    weight.grad = torch.arange(6.0).view(3, 2).t()
    optimizer.step()
assert torch.equal(*weights)
assert bool(caught) == bool(fused), caught
"""


def _laptop(prelude: str, name: str, device: str, fused: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", prelude + _LAPTOP, name, device, fused]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.parametrize("fused", ["None", "True"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop"])
def test_cpu_without_the_interpreter_goes_torchs_way(name: str, fused: str) -> None:
    _laptop("", name, "cuda", fused)


def test_without_triton_all_goes_torchs_way() -> None:
    _laptop("import sys; sys.modules['triton'] = None\n", "RMSprop", "None", "None")
