"""What only a GPU can show. Everything else runs there natively, in the other files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_bits, raises
from cases import Case, Spec, Tensors, every_state, grad_of, new_param
from embedding_tables import Tables
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend

pytestmark = pytest.mark.gpu
SPECS = (Spec("a", lambda draw: draw(5)), Spec("b", lambda draw: draw(100, 77)))


@contextmanager
def _synchronisation_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_state
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"fused": True}, {"max_grad_norm": 1.0, "skip_nonfinite": True}, {"capturable": True}],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True])
def test_no_synchronisation(case: Case, kwargs: dict[str, Any], scaled: bool) -> None:
    tensors = Tensors(torch.float32, specs=SPECS)
    optimizer = case.ours(tensors.params, **kwargs)
    if scaled:
        told = (torch.zeros((), device="cuda"), torch.full((), 8.0, device="cuda"))
        optimizer.found_inf, optimizer.grad_scale = told
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
    tensors.train(optimizer, 2)
    gradients = [torch.randn_like(param) for param in tensors.params]
    with _synchronisation_raises():
        for _ in range(2):
            for param, grad in zip(tensors.params, gradients, strict=True):
                param.grad = grad.clone()
            optimizer.step()


SPARSE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {}),
    ("Adagrad", {"lr_decay": 0.1}),
    ("RowwiseAdagrad", {}),
    ("RMSprop", {"sparse": "lazy", "centered": True}),
)


@pytest.mark.parametrize(("name", "kwargs"), SPARSE, ids=[name for name, _ in SPARSE])
def test_sparse_steps_synchronise_with_nothing_and_repeat_their_bits(
    name: str, kwargs: dict[str, Any]
) -> None:
    """Rows of 1 to 30,000 duplicates, over hundreds of programs."""
    results = []
    for _ in range(3):
        tables = Tables([(1000, 64), (50, 64)], torch.float32)
        optimizer = getattr(triton_optim, name)(tables.params, fused=True, **kwargs)
        tables.new_gradients([40_000, 500], hot=30_000)
        optimizer.step()
        tables.new_gradients([50_000, 100], hot=20_000)
        with _synchronisation_raises():
            optimizer.step()
        results.append([[param.detach() for param in tables.params], optimizer.state_dict()])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


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
    torch.testing.assert_close(ours.params, theirs.params)


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


def test_beyond_two_to_the_31_elements() -> None:
    """Every element has a gradient of its own among its neighbours, and every one is checked."""
    numel = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 5 * numel * 2:
        pytest.skip("needs 21 GB of free memory")

    def chunks() -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, numel, 2**27):
            index = torch.arange(start, min(start + 2**27, numel), device="cuda")
            yield slice(start, start + 2**27), (index % 251 + 1).bfloat16() / 256

    param = Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.empty_like(param)
    for where, values in chunks():
        param.grad[where] = values
    triton_optim.SGD([param], lr=1.0).step()
    for where, values in chunks():
        assert torch.equal(param.detach()[where], 1 - values)


def test_a_gradient_on_another_device() -> None:
    params = [new_param(5), new_param(3, 4)]
    optimizer = triton_optim.RMSprop(params)
    optimizer.step()
    grad_of(params[1]).data = grad_of(params[1]).data.cpu()
    with raises(r"gradient of parameter 1 of group 0 is \(3, 4\) on cpu", optimizer, params):
        optimizer.step()


@every_state
def test_gradients_of_one_stream_and_steps_on_others(case: Case) -> None:
    """The tables outlive what still runs when the optimizer is gone and its memory is reused."""
    ours, theirs = (Tensors(torch.float64, specs=SPECS) for _ in range(2))
    theirs.train(case.theirs(theirs.params), 3)
    optimizer = case.ours(ours.params)
    main, first, second = (torch.cuda.Stream() for _ in range(3))
    torch.cuda.synchronize()
    for stream in (first, second, second):
        with torch.cuda.stream(main):
            torch.cuda._sleep(10**8)
            ours.new_gradients()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            optimizer.step()
        main.wait_stream(stream)
    state = dict(optimizer.state)
    del optimizer
    with torch.cuda.stream(first):
        reused = [torch.full((1024,), -1, device="cuda") for _ in range(100)]
    assert not second.query()
    torch.cuda.synchronize()
    assert len(reused) == 100 and len(state) in (0, len(SPECS))
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-12, atol=1e-12)


@every_state
def test_two_optimizers_on_two_streams(case: Case) -> None:
    sets = [Tensors(torch.float64, specs=SPECS, seed=seed) for seed in (1, 2, 1, 2)]
    optimizers = [case.ours(t.params) for t in sets[:2]] + [case.theirs(t.params) for t in sets[2:]]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(5):
        for tensors, optimizer, stream in zip(sets, optimizers, streams * 2, strict=True):
            with torch.cuda.stream(stream):
                tensors.train(optimizer, 1)
    torch.cuda.synchronize()
    for ours, theirs in zip(sets[:2], sets[2:], strict=True):
        torch.testing.assert_close(ours.params, theirs.params, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """Over a few steps of every state layout; without torch's cache, which would hide overruns."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable]
    probe = [*command, "-c", "import torch; torch.ones(1, device='cuda').sum().item()"]
    probed = subprocess.run(probe, capture_output=True, text=True, check=False)
    if probed.returncode != 0:
        pytest.skip(f"compute-sanitizer does not work on this device: {probed.stdout[-300:]}")
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run([*command, "tests/helpers/short_run.py"], check=True, cwd=root, env=environment)


def test_kernels_run_compiled() -> None:
    assert backend.COMPILED
