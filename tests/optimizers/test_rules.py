"""Every rule and flag against torch's for-loop, in float64 and in the storage dtype."""

import itertools

import pytest
import torch
from assertions import assert_no_worse, largest
from cases import CASES, DEVICE, DTYPES, SCALARS, SPECS, Case, Tensors, double, each, grad_of
from reference import Reference
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend


def _compare(case: Case, dtype: torch.dtype) -> None:
    ours, theirs, exact = Tensors(dtype), Tensors(dtype), Tensors(dtype, double(dtype))
    # fused=True: a parameter that the kernels do not take would be an error
    our_optimizer = case.ours(ours.params, fused=True)
    their_optimizer = case.theirs(theirs.params)
    exact_optimizer = case.theirs(exact.params)
    for tensors, optimizer in (
        (ours, our_optimizer),
        (theirs, their_optimizer),
        (exact, exact_optimizer),
    ):
        tensors.train(optimizer)
    assert_no_worse(ours.params, theirs.params, exact.params, "param")
    states = [
        [optimizer.state[param] for param in tensors.params]
        for tensors, optimizer in (
            (ours, our_optimizer),
            (theirs, their_optimizer),
            (exact, exact_optimizer),
        )
    ]
    assert [list(state) for state in states[0]] == [list(state) for state in states[1]]
    for key in states[0][0]:
        a, b, c = ([state[key] for state in group] for group in states)
        # torch's CPU loops fuse multiply and add, the interpreter cannot; cancellation under the
        # centered root makes three units of it, once in some 100,000 elements.
        assert_no_worse(a, b, c, key, units=4)
    for param, state, their_state in zip(ours.params, *states[:2], strict=True):
        for key, value in state.items():
            assert value.dtype == their_state[key].dtype
            assert key in SCALARS or value.stride() == param.stride()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@each(CASES)
def test_error_is_no_larger_than_torchs(case: Case, dtype: torch.dtype) -> None:
    _compare(case, dtype)


@each(CASES)
def test_float64_against_extended_precision(case: Case) -> None:
    ours, theirs = Tensors(torch.float64), Tensors(torch.float64)
    exact = [Reference(case.optimizer, p, **case.kwargs) for p in ours.params]
    our_optimizer, their_optimizer = case.ours(ours.params), case.theirs(theirs.params)
    for _ in range(4):
        ours.new_gradients()
        theirs.new_gradients()
        for reference, param in zip(exact, ours.params, strict=True):
            reference.step(grad_of(param))
        our_optimizer.step()
        their_optimizer.step()
    unit = max(reference.unit() for reference in exact)
    for spec, p, q, reference in zip(SPECS, ours.params, theirs.params, exact, strict=True):
        assert reference.error(p) <= reference.error(q) + unit, spec.name


@each(CASES)
@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "state_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.bfloat16),
        (torch.float64, torch.float32, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes(
    case: Case, param_dtype: torch.dtype, grad_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """Storage may differ; the arithmetic is that of float32, or of float64 parameters.

    One step from given state, computed once more in float64: each result is within a rounding of
    its storage dtype, and some of the arithmetic's.
    """
    specs = [s for s in SPECS if s.name in ("0-dim", "block+1", "misaligned", "transposed")]
    ours = Tensors(torch.float16, param_dtype, specs)
    exact = Tensors(torch.float16, torch.float64, specs)
    optimizer, reference = case.ours(ours.params, fused=True), case.theirs(exact.params)
    for tensors, opt in ((ours, optimizer), (exact, reference)):
        tensors.train(opt, steps=1)
    for p, e in zip(ours.params, exact.params, strict=True):
        for key, value in optimizer.state[p].items():
            if key not in SCALARS:
                optimizer.state[p][key] = value.to(state_dtype)
                reference.state[e][key] = value.to(state_dtype).double().clone()
        e.data = p.data.double().clone()
        assert p.grad is not None
        p.grad.data = p.grad.data.to(grad_dtype)
        grad_of(e).data = p.grad.data.double().clone()
    optimizer.step()
    reference.step()
    work = torch.finfo(torch.float64 if param_dtype == torch.float64 else torch.float32).eps
    for p, e in zip(ours.params, exact.params, strict=True):
        pairs = {"param": (p, e)}
        pairs |= {k: (v, reference.state[e][k]) for k, v in optimizer.state[p].items()}
        for key, (value, expected) in pairs.items():
            unit = torch.finfo(value.dtype).eps / 2 + 16 * work
            held = ~expected.isnan()  # torch's is NaN where storage made a variance negative
            assert held.sum() >= 0.99 * held.numel(), key
            error = largest((value.double() - expected)[held]) / max(1.0, largest(expected[held]))
            assert error <= unit, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "momentum" in c.kwargs], ids=lambda c: c.name)
def test_16_bit_storage_is_better_than_torchs(case: Case, dtype: torch.dtype) -> None:
    """torch rounds every intermediate of a rule with momentum, the kernel only the result."""
    specs = [spec for spec in SPECS if spec.name in ("blocks", "2d", "transposed")]
    runs = [Tensors(dtype, kept, specs) for kept in (dtype, dtype, torch.float64)]
    for tensors, make in zip(runs, (case.ours, case.theirs, case.theirs), strict=True):
        tensors.train(make(tensors.params), steps=10)
    ours, theirs, exact = (
        torch.cat([param.detach().double().flatten() for param in tensors.params])
        for tensors in runs
    )
    error, torch_error = (ours - exact).norm(), (theirs - exact).norm()
    assert error < torch_error or not torch_error.isfinite()


# Of 16 bits, some of whose squares are stored as 0 and some as infinite.
EXTREMES = (0.0, 1e-7, 1.7e-3, 1.0, -1.0, 300.0, 6e4)
FINITE_CASES = (
    *CASES,
    Case("rmsprop-centered-eps", "RMSprop", {"lr": 0.01, "centered": True, "eps": 1e-3}),
    Case("rmsprop-slow", "RMSprop", {"lr": 0.01, "centered": True, "alpha": 0.9999}),
    Case("rmsprop-forgetful", "RMSprop", {"lr": 0.01, "alpha": 0.0}),
    Case("adagrad-no-eps", "Adagrad", {"lr": 0.01, "eps": 0.0}),
)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@each(FINITE_CASES)
def test_finite_where_torchs_is(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step of every sequence of extreme gradients: storage rounds what follows."""
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (4096,))
    grads = torch.tensor([*itertools.product(EXTREMES, repeat=4)], device=DEVICE).T.to(dtype)
    params = [Parameter(torch.ones_like(grads[0])) for _ in range(2)]
    optimizers = [case.ours(params[:1]), case.theirs(params[1:])]
    for grad in grads:
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        ours, theirs = (param.isfinite() for param in params)
        assert not bool((theirs & ~ours).any())


def test_a_variance_that_storage_made_negative() -> None:
    """The mean of squares is stored as 0, that of gradients is not: torch's result is -0.017."""
    param = Parameter(torch.zeros(1, dtype=torch.float16, device=DEVICE))
    optimizer = triton_optim.RMSprop([param], lr=0.01, centered=True, eps=1e-3)
    exact = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.RMSprop([exact], lr=0.01, centered=True, eps=1e-3)
    for grad in (0.0017, 0.0):
        param.grad = torch.tensor([grad], dtype=torch.float16, device=DEVICE)
        exact.grad = param.grad.double().cpu()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(param.cpu().double(), exact.detach(), rtol=1e-3, atol=0)
