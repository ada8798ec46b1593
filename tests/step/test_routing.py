"""Which route a parameter takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import BLOCK, DEVICE, Case, every_state, grad_of, new_param, two_copies
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.variant import Variant
from triton_optim.step import routing


@every_state
@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": False}])
def test_flags_that_fall_back(case: Case, flags: dict[str, bool], launches: list[Variant]) -> None:
    p, q = two_copies(new_param(5))
    ours = case.ours([p], **flags)
    theirs = case.theirs([q])
    for _ in range(2):
        ours.step()
        theirs.step()
    assert launches == []
    torch.testing.assert_close(p, q)


@every_state
def test_differentiable_falls_back(case: Case) -> None:
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


@every_state
def test_a_parameter_that_is_not_dense_falls_back(case: Case, launches: list[Variant]) -> None:
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
    p, q = two_copies(new_param(5, dtype=torch.complex64))
    for param in (p, q):
        param.grad = grad_of(param).conj()
    triton_optim.SGD([p], fused=True).step()
    torch.optim.SGD([q]).step()
    torch.testing.assert_close(p, q)


@every_state
def test_a_gradient_that_loses_its_alignment(case: Case, launches: list[Variant]) -> None:
    p, q = two_copies(new_param(BLOCK + 1))
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
    p, q = two_copies(new_param(2, 3, 4, 5))
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
        conjugate = param.is_conj()  # which a copy to another device resolves
        param, grad = param.to(DEVICE), grad.to(DEVICE)
        param = param.resolve_conj().conj() if conjugate else param
    assert reason in str(routing.tensors_unsupported(param, grad))


def test_an_inference_tensor_in_inference_mode(launches: list[Variant]) -> None:
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
    params = two_copies(new_param(5))
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


def test_a_parameter_put_into_a_group_that_falls_back_too() -> None:
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


def test_a_flag_that_a_group_gets_later(launches: list[Variant]) -> None:
    """RMSprop's `fused` is no key of its groups until somebody makes it one."""
    optimizer = triton_optim.RMSprop([new_param(5)])
    optimizer.step()
    optimizer.param_groups[0]["fused"] = False
    optimizer.step()
    assert len(launches) == 1
