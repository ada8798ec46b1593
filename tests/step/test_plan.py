"""Launches, bytes, and what is kept from step to step."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DEVICE, STATEFUL_CASES, Case, each, every_state, grad_of, interpreted
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

import triton_optim
from triton_optim.kernels.chunks import FIRST
from triton_optim.launch import backend, pointer_tables, tuning
from triton_optim.launch.device_buffer import Buffer
from triton_optim.launch.variant import Variant
from triton_optim.step import plan
from triton_optim.step.dense import DenseLaunchGroup


def _params(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    params = [Parameter(torch.randn(*shape, device=DEVICE).to(dtype)) for _ in range(n)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


@pytest.mark.parametrize(
    ("case", "n"),
    [*((case, 300) for case in STATEFUL_CASES), (STATEFUL_CASES[2], 3000)],
    ids=lambda value: getattr(value, "name", value),
)
def test_one_launch_for_many_tensors_in_six_groups(
    case: Case, n: int, launches: list[Variant]
) -> None:
    params, twins = _params(n, 2, 3), _params(n, 2, 3)
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param)
        twin.grad = grad_of(param).clone()
    for make, tensors in ((case.ours, params), (case.theirs, twins)):
        make([{"params": tensors[i::6], "lr": 0.01 * (i + 1)} for i in range(6)]).step()
    assert len(launches) == 1
    torch.testing.assert_close(params, twins)


def test_step_counters_take_one_operation() -> None:
    """All `step`s lie side by side, and one operation counts them; each has its own storage."""
    optimizer = triton_optim.RMSprop(_params(5, 3))
    optimizer.step()
    steps = [state["step"] for state in optimizer.state.values()]
    addresses = sorted(step.data_ptr() for step in steps)
    assert addresses == [*range(addresses[0], addresses[0] + 5 * 4, 4)]
    assert {step.untyped_storage().nbytes() for step in steps} == {4}
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    names = [event.key for event in profiled.key_averages()]
    assert "aten::index_add_" in names
    assert "aten::_foreach_add_" not in names
    assert [float(step) for step in steps] == [2.0] * 5
    assert all(step.device.type == "cpu" and step.dtype == torch.float32 for step in steps)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each(CASES)
def test_bytes_are_within_one_percent_of_the_floor(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of 100,000 elements in a GPU's blocks: each element once, and the tables.

    20 tensors where the tables weigh most; 1, which has the same tables an element, for the others.
    """
    from lab.traffic import Traffic, watched

    monkeypatch.setattr(
        backend, "config", lambda variant, *_: tuning.config("sm_90", half=variant.half)
    )
    n = 20 if case.name == "sgd" and dtype == torch.bfloat16 else 1
    optimizer = case.ours(_params(n, 100_000, dtype=dtype), fused=True)
    traffic = Traffic()
    with watched(traffic.count):
        optimizer.step()
    n_states = sum(v.numel() == 100_000 for s in optimizer.state.values() for v in s.values())
    floor = dtype.itemsize * (3 * n + 2 * n_states) * 100_000
    assert traffic.stored == dtype.itemsize * (n + n_states) * 100_000
    assert floor < traffic.loaded + traffic.stored <= 1.01 * floor


@every_state
def test_nothing_is_sent_when_nothing_changed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy a step where gradients are new, and none where they stayed."""
    sent: list[int] = []
    sendable = pointer_tables.pin

    def recorded(host: Tensor, device: torch.device) -> Tensor:
        sent.append(host.numel())
        return sendable(host, device)

    monkeypatch.setattr(pointer_tables, "pin", recorded)
    params = _params(3, 5)
    optimizer = case.ours(params)
    optimizer.step()
    optimizer.step()  # what the first update alone needed is gone now
    # A rule that reads the step counts is sent them, for they live on the CPU.
    counts = int(case.name in ("adagrad-lr_decay", "adamw-all"))
    for change, expected in (
        (lambda: None, counts),
        (lambda: optimizer.param_groups[0].update(lr=0.5), 1),
        (lambda: None, counts),
        (lambda: setattr(params[0], "grad", torch.randn(5, device=DEVICE)), 1),
    ):
        sent.clear()
        change()
        optimizer.step()
        assert len(sent) == expected


@every_state
def test_the_plan_is_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    params = _params(3, 5)
    optimizer = case.ours(params)
    optimizer.step()
    kept = optimizer._stepper.plan
    for step in range(4):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
    assert optimizer._stepper.plan is kept
    params[1].data = params[1].data.clone()
    optimizer.step()
    assert optimizer._stepper.plan is not kept


def test_no_gradient_at_all(launches: list[Variant]) -> None:
    for name in triton_optim.OPTIMIZERS:
        optimizer = getattr(triton_optim, name)([Parameter(torch.ones(3, device=DEVICE))])
        optimizer.step()
        assert getattr(triton_optim, name)([Parameter(torch.ones(0, device=DEVICE))])
    assert launches == []


def test_buckets_by_dtype_and_alignment(launches: list[Variant]) -> None:
    params = [*_params(2, 5), *_params(2, 5, dtype=torch.bfloat16)]
    base = torch.zeros(9, device=DEVICE)
    params.append(Parameter(base[1:6]))
    params[-1].grad = torch.ones(5, device=DEVICE)
    triton_optim.SGD(params).step()
    assert [(v.param_dtype, v.aligned) for v in launches] == [
        ("float32", True),
        ("bfloat16", True),
        ("float32", False),
    ]
    assert torch.equal(base, torch.tensor([0.0] + [-1e-3] * 5 + [0.0] * 3, device=DEVICE))


def test_programs_of_a_tensor_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every launch; the row of a tensor says which program is its first."""
    monkeypatch.setattr(backend, "config", lambda *_: tuning.Config(4, 1, blocks=2))
    kinds = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    params = [p for n, d in zip((17, 9, 0, 8), kinds, strict=True) for p in _params(1, n, dtype=d)]
    optimizer = triton_optim.SGD(params)
    optimizer.step()
    assert optimizer._stepper.plan is not None
    table = optimizer._stepper.plan.launch_groups[0]
    assert isinstance(table, DenseLaunchGroup)
    launches = table._launches[frozenset()]
    assert [launch.spec.block_to_tensor.tolist() for launch in launches] == [[0, 0, 0, 3], [1, 1]]
    assert launches[0].tables.rows[:, FIRST.value].tolist() == [0, 0, 0, 3]
    assert launches[0].spec.block_to_tensor.dtype == torch.int32


@interpreted
def test_interpreted_block_size_weighs_programs_against_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    variant = Variant(frozenset(), "float32", "float32", (), True, False)
    for numels, sizes in (
        ([10] * 100, {1024}),
        ([10**7], {2**18}),
        ([10**6, *[100] * 50], {2**k for k in range(10, 18)}),
    ):
        assert backend.config(variant, numels, torch.device("cpu")).block_size in sizes


def test_same_objects_are_not_compared_by_value() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    assert plan.not_identical([a], [b])
    assert not plan.not_identical([a, b], [a, b])


@pytest.mark.parametrize("n_grads", [3, 4, 15])
def test_what_is_sent_fills_its_buffer(n_grads: int) -> None:
    """With steps that are counted on another device; on meta, where sizes alone are checked."""
    hypers: list[float | Tensor] = [0.1] * 5
    buffer = Buffer(torch.device("meta"), n_grads, len(hypers), 3)
    buffer.send(pointer_tables.column("q", range(n_grads)), hypers, 0.0, [1.0, 2.0, 3.0])
    assert len(buffer.steps) == 4
