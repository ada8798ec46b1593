"""What only a GPU can show. Everything else runs there natively, in the other files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import STATEFUL_CASES, Case, Spec, Tensors
from torch.nn import Parameter

import triton_optim
from triton_optim import runtime

pytestmark = pytest.mark.gpu
every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)
SPECS = (Spec("a", lambda draw: draw(5)), Spec("b", lambda draw: draw(100, 77)))


@every_state
@pytest.mark.parametrize("fused", [None, True])
def test_no_synchronisation(case: Case, fused: bool | None) -> None:
    tensors = Tensors(torch.float32, specs=SPECS)
    optimizer = case.ours(tensors.params, fused=fused)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
    tensors.train(optimizer, 2)
    gradients = [torch.randn_like(param) for param in tensors.params]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for param, grad in zip(tensors.params, gradients, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_state
def test_learning_rate_on_the_gpu(case: Case) -> None:
    ours, theirs = (Tensors(torch.float64, specs=SPECS) for _ in range(2))
    rate = torch.tensor(0.1, device="cuda", dtype=torch.float64)
    mine, other = case.ours(ours.params, lr=rate), case.theirs(theirs.params, lr=0.1)
    for lr in (0.1, 0.0, 0.3):
        rate.fill_(lr)
        other.param_groups[0]["lr"] = lr
        ours.train(mine, 1)
        theirs.train(other, 1)
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q)


def test_adagrads_state_follows_a_model_that_moves() -> None:
    model = torch.nn.Linear(5, 7)
    optimizer = triton_optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    model.to("cuda")
    reference = torch.nn.Linear(5, 7).to("cuda")
    reference.load_state_dict(model.state_dict())
    expected = torch.optim.Adagrad(reference.parameters(), initial_accumulator_value=0.5)
    x = torch.randn(3, 5, device="cuda")
    for module, opt in ((model, optimizer), (reference, expected)):
        module(x).square().sum().backward()
        opt.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert optimizer.state[p]["sum"].is_cuda


@every_state
def test_no_compilation_after_the_first_steps(case: Case) -> None:
    from triton_optim.kernels.multi_tensor import multi_tensor_kernel

    def compiled() -> int:
        caches: Any = multi_tensor_kernel.device_caches
        return sum(len(cache[0]) for cache in caches.values())

    tensors = Tensors(torch.float32, specs=SPECS)
    tensors.train(case.ours(tensors.params), 2)
    before = compiled()
    other = Tensors(torch.float32, specs=(Spec("c", lambda draw: draw(3000)),) * 7)
    other.train(case.ours(other.params, lr=0.5, weight_decay=0.25), 3)
    assert compiled() == before


def test_capture_is_refused() -> None:
    param = Parameter(torch.ones(5, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = triton_optim.SGD([param])
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph capture"), torch.cuda.graph(graph):
        optimizer.step()


def test_beyond_two_to_the_31_elements() -> None:
    numel = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 5 * numel * 2:
        pytest.skip("needs 21 GB of free memory")
    param = Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.5)
    triton_optim.SGD([param], lr=1.0).step()
    for chunk in param.detach().split(2**28):
        assert bool((chunk == 0.5).all())


def test_kernels_run_compiled() -> None:
    assert runtime.COMPILED
