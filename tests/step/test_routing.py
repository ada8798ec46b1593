"""Which way a parameter goes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import BLOCK, DEVICE, STATEFUL_CASES, Case, assert_same_bits, new_param, twins_of
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend
from triton_optim.step import routing

every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)


@every_state
@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": False}])
def test_flags_that_take_torchs_way(
    case: Case, flags: dict[str, bool], launches: list[backend.Variant]
) -> None:
    p, q = twins_of(new_param(5))
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
def test_sparse_gradients_beside_dense_ones(name: str, launches: list[backend.Variant]) -> None:
    kwargs: dict[str, Any] = {"lr": 0.1}
    embeddings = [torch.nn.Embedding(10, 3, sparse=True, device=DEVICE) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    dense = twins_of(new_param(BLOCK + 1))
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


def test_sparse_gradients_on_rdna(monkeypatch: pytest.MonkeyPatch) -> None:
    """No order among what a program stores there: only dense gradients have a kernel."""
    dense, sparse = new_param(4, 3), new_param(4, 3)
    sparse.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 3), (4, 3), device=DEVICE
    )
    monkeypatch.setattr(backend, "COMPILED", True)
    for architecture, reason in (
        ("gfx942", None),
        ("sm_90", None),
        ("gfx1100", "its gradient is sparse, on gfx1100"),
    ):
        monkeypatch.setattr(backend, "architecture", lambda _, name=architecture: name)
        assert routing.tensors_unsupported(sparse, sparse.grad, row_wise=True) == reason
        assert dense.grad is not None
        assert routing.tensors_unsupported(dense, dense.grad, row_wise=True) is None


def test_a_sparse_gradient_that_becomes_dense(launches: list[backend.Variant]) -> None:
    p, q = twins_of(new_param(4, 3))
    ours, theirs = triton_optim.Adagrad([p]), torch.optim.Adagrad([q])
    for sparse in (True, True, False, False, True, False):
        for param, optimizer in ((p, ours), (q, theirs)):
            grad = torch.ones_like(param).detach()
            param.grad = grad.to_sparse(1) if sparse else grad
            optimizer.step()
        torch.testing.assert_close(p, q)
    assert len(launches) == 3


@every_state
def test_a_parameter_that_is_not_dense_goes_torchs_way(
    case: Case, launches: list[backend.Variant]
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
    p, q = twins_of(new_param(5, dtype=torch.complex64))
    for param in (p, q):
        assert param.grad is not None
        param.grad = param.grad.conj()
    triton_optim.SGD([p], fused=True).step()
    torch.optim.SGD([q]).step()
    torch.testing.assert_close(p, q)


@every_state
def test_a_gradient_that_loses_its_alignment(case: Case, launches: list[backend.Variant]) -> None:
    p, q = twins_of(new_param(BLOCK + 1))
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
    p, q = twins_of(new_param(2, 3, 4, 5))
    ours, theirs = triton_optim.Adagrad([p]), torch.optim.Adagrad([q])
    for param, optimizer in ((p, ours), (q, theirs)):
        optimizer.step()
        state = optimizer.state[param]
        state["sum"] = state["sum"].to(memory_format=torch.channels_last)
        optimizer.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(ours.state[p]["sum"], theirs.state[q]["sum"])


def _inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, device=DEVICE)


@pytest.mark.parametrize(
    ("param", "grad", "reason"),
    [
        (torch.ones(2, device="meta"), torch.ones(2, device="meta"), "it is on meta"),
        (torch.ones(2).int(), torch.ones(2).int(), "torch.int32 is none of"),
        (torch.ones(2), torch.ones(2).to(torch.float8_e5m2), "torch.float8_e5m2 is none of"),
        (torch.ones(2), torch.ones(2).to(torch.complex64), "torch.float32 with a torch.complex64"),
        (
            torch.ones(2).to(torch.complex64).conj(),
            torch.ones(2).to(torch.complex64),
            "do not fill one span",
        ),
        (_inference_tensor(), torch.ones(2), "it is an inference tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_kernels_cannot_update(param: Tensor, grad: Tensor, reason: str) -> None:
    if not param.is_meta:
        param, grad = param.to(DEVICE), grad.to(DEVICE)
    assert reason in str(routing.tensors_unsupported(param, grad))


def test_an_inference_tensor_in_inference_mode(launches: list[backend.Variant]) -> None:
    param = _inference_tensor()
    optimizer = triton_optim.SGD([param], lr=0.5)
    with torch.inference_mode():
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert len(launches) == 1
    assert torch.equal(param, torch.full_like(param, 0.5))


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_a_step_in_inference_mode_and_steps_outside(name: str) -> None:
    """As torch's, whose state RMSprop cannot write outside either."""
    params = twins_of(new_param(5))
    optimizers = [
        getattr(triton_optim, name)(params[:1]),
        getattr(torch.optim, name)(params[1:], foreach=False),
    ]
    for grad in (1.0, 1.0, 0.5):
        for mode in (True, False):
            for param, optimizer in zip(params, optimizers, strict=True):
                param.grad = torch.full_like(param, grad)
                with torch.inference_mode(mode):
                    optimizer.step()
    torch.testing.assert_close(*params)


def test_a_parameter_put_into_a_group_of_torchs_way_too() -> None:
    """One step for each place in which it stands."""
    params = [[new_param(5), new_param(5)] for _ in range(2)]
    for ours, theirs in zip(*params, strict=True):
        theirs.data.copy_(ours)
        theirs.grad = ours.grad
    for make, (a, b), kwargs in (
        (triton_optim.SGD, params[0], {"foreach": True}),
        (torch.optim.SGD, params[1], {}),
    ):
        groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], **kwargs}]
        optimizer = make(groups, lr=0.1)
        optimizer.step()
        optimizer.param_groups[1]["params"][0] = a
        optimizer.step()
    torch.testing.assert_close(*params)


def test_a_flag_that_a_group_gets_later(launches: list[backend.Variant]) -> None:
    """RMSprop's `fused` is no key of its groups until somebody makes it one."""
    optimizer = triton_optim.RMSprop([new_param(5)])
    optimizer.step()
    optimizer.param_groups[0]["fused"] = False
    optimizer.step()
    assert len(launches) == 1


_LAPTOP = """
import sys, warnings
import torch, triton_optim
from triton_optim.launch import backend
assert str(backend.DEVICE_TYPE) == sys.argv[2], backend.DEVICE_TYPE
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
ours.add_param_group({"params": weights[:1]})
# before 2.12 torch's Adagrad makes no state for a group that is added
for weight, optimizer in zip(weights, (ours, type(theirs)(weights[1:], lr=0.1))):
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


def test_row_wise_adagrad_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch, triton_optim
param = torch.nn.Parameter(torch.ones(2, 2))
param.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
triton_optim.RowwiseAdagrad([param], lr=12.5 ** 0.5, eps=0).step()
assert param[0].tolist() == [-2.0, -3.0], param
"""
    subprocess.run([sys.executable, "-c", script], check=True)
