"""`state[p]["step"]`: the tensor that is there counts, wherever it came from."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from cases import DEVICE, new_param
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import record_launches

COUNTING = ("Adagrad", "RMSprop", "RowwiseAdagrad")
counting = pytest.mark.parametrize("name", COUNTING)


def _make(name: str, n: int = 3, **kwargs: Any) -> tuple[Any, list[Parameter]]:
    params = [new_param(5) for _ in range(n)]
    return getattr(triton_optim, name)(params, **kwargs), params


def _steps(optimizer: Any) -> list[Tensor]:
    return [state["step"] for state in optimizer.state.values()]


CHANGES: dict[str, Callable[[Any, list[Parameter]], object]] = {
    "plan anew": lambda _, params: setattr(params[1], "data", params[1].data.clone()),
    "freeze": lambda _, params: setattr(params[0], "grad", None),
    "add": lambda optimizer, _: optimizer.add_param_group({"params": [new_param(7)]}),
    # into another one: what was exported stays as it was
    "load": lambda o, _: _make(type(o).__name__)[0].load_state_dict(o.state_dict()),
    "replace": lambda o, params: o.state[params[1]].update(step=torch.tensor(1.0)),
}


@counting
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fused", [None, True])
def test_a_reference_that_a_user_took_counts(name: str, change: str, fused: bool | None) -> None:
    optimizer, params = _make(name, fused=fused)
    optimizer.step()
    taken = _steps(optimizer)
    CHANGES[change](optimizer, params)
    expected = [float(step) + 1 for step in taken]
    if change == "freeze":
        expected[0] -= 1
    if change == "replace":
        expected[1] -= 1
    optimizer.step()
    assert [float(step) for step in taken] == expected
    replaced = int(change == "replace")
    assert sum(a is not b for a, b in zip(taken, _steps(optimizer), strict=False)) == replaced
    assert float(optimizer.state[params[1]]["step"]) == 2


def test_a_reference_from_before_the_first_step_counts() -> None:
    optimizer, _ = _make("Adagrad")
    taken = _steps(optimizer)
    optimizer.step()
    assert [float(step) for step in taken] == [1.0] * 3


@counting
def test_steps_of_a_loaded_checkpoint_count_at_once(name: str) -> None:
    """And not in the checkpoint: torch would count there, too."""
    optimizer, _ = _make(name)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    other, _ = _make(name)
    other.load_state_dict(checkpoint)
    taken = _steps(other)
    other.step()
    assert [float(step) for step in taken] == [2.0] * 3
    assert [float(state["step"]) for state in checkpoint["state"].values()] == [1.0] * 3


@counting
@pytest.mark.parametrize(
    "step",
    [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)],
    ids=lambda step: f"{step.dtype}{tuple(step.shape)}",
)
@pytest.mark.parametrize("skips", [False, True])
def test_a_step_of_the_users_own_counts(name: str, step: Tensor, skips: bool) -> None:
    """Of another shape or dtype; on the host, and where a scaler may skip."""
    optimizer, params = _make(name)
    optimizer.step()
    own = optimizer.state[params[1]]["step"] = step.clone()
    for _ in range(2):
        if skips:
            optimizer.found_inf = torch.zeros((), device=DEVICE)
        optimizer.step()
    assert float(own) == 5.0
    assert optimizer.state[params[1]]["step"] is own


def test_the_rule_reads_the_users_step() -> None:
    params = [[new_param(4, dtype=torch.float64)] for _ in range(2)]
    params[1][0].data.copy_(params[0][0])
    params[1][0].grad = params[0][0].grad
    for skips in (False, True):
        ours = triton_optim.Adagrad(params[0], lr=0.1, lr_decay=0.5)
        theirs = torch.optim.Adagrad(params[1], lr=0.1, lr_decay=0.5, foreach=False)
        for _ in range(2):
            for (param,), optimizer in zip(params, (ours, theirs), strict=True):
                optimizer.state[param]["step"] = torch.tensor(7.0)
            if skips:
                vars(ours)["found_inf"] = torch.zeros((), device=DEVICE)
            ours.step()
            theirs.step()
        torch.testing.assert_close(params[0], params[1], rtol=1e-12, atol=1e-12)


@counting
def test_a_step_takes_what_torchs_takes(name: str) -> None:
    """Saved alone, and copied."""
    optimizer, params = _make(name, n=200)
    optimizer.step()
    step = optimizer.state[params[7]]["step"]
    sizes = []
    for tensor in (step, torch.ones(())):
        file = io.BytesIO()
        torch.save({"step": tensor}, file)
        sizes.append(file.tell())
    assert sizes[0] == sizes[1]
    assert copy.deepcopy(step).untyped_storage().nbytes() == 4


def _step_once(optimizer: Any, param: Parameter) -> None:
    param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.skipif(DEVICE != "cpu", reason="shares memory of the CPU")
@pytest.mark.parametrize("make", [triton_optim.Adagrad, torch.optim.Adagrad])
def test_state_in_shared_memory(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, one after another, count in it; as in A3C."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    param = Parameter(torch.ones(3).share_memory_())
    optimizer = make([param], lr=1.0, lr_decay=1.0)
    for value in optimizer.state[param].values():
        value.share_memory_()
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triton_optim", "torch._dynamo"])
    for _ in range(3):
        process = context.Process(target=_step_once, args=(optimizer, param))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert float(optimizer.state[param]["step"]) == 3
    expected = 1 - sum(1 / (k * k**0.5) for k in (1, 2, 3))
    torch.testing.assert_close(param.detach(), torch.full((3,), expected))
    _step_once(optimizer, param)
    assert float(optimizer.state[param]["step"]) == 4


def test_counters_are_freed_with_their_state() -> None:
    """State that comes and goes does not pile up."""
    optimizer, params = _make("RMSprop")
    for _ in range(10):
        optimizer.state.clear()
        optimizer.step()
    assert len(optimizer._stepper.counters.packs()) <= 2
    assert [float(step) for step in _steps(optimizer)] == [1.0] * len(params)


@counting
def test_counts_on_the_device_take_one_launch(name: str) -> None:
    optimizer, params = _make(name, n=300)
    for found_inf in (0.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
        with record_launches() as launches:
            optimizer.step()
        assert [launch.name for launch in launches].count("count_kernel") == 1
        params[3].grad = None
    counts = [float(step) for step in _steps(optimizer)]
    assert counts == [2.0, 2.0, 2.0, 1.0, *[2.0] * 296]


@counting
def test_a_shallow_copy_leaves_a_reference_counting(name: str) -> None:
    """It shares the state with its original."""
    optimizer, params = _make(name)
    optimizer.step()
    taken = _steps(optimizer)
    twin = copy.copy(optimizer)
    optimizer.step()
    twin.step()
    assert [float(step) for step in taken] == [3.0] * len(params)


@counting
def test_a_copy_made_together_with_a_step(name: str) -> None:
    optimizer, params = _make(name)
    optimizer.step()
    clone, step = copy.deepcopy((optimizer, optimizer.state[params[0]]["step"]))
    for group in clone.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    clone.step()
    assert float(step) == 2
    assert [float(step) for step in _steps(optimizer)] == [1.0] * len(params)


def test_a_lazy_step_beyond_what_float32_counts_is_loaded() -> None:
    """From shared memory, too, where it is not replaced."""
    param = new_param(4, 3, dtype=torch.float64)
    param.grad = param.detach().to_sparse(1)
    optimizer = triton_optim.RMSprop([param], sparse="lazy")
    optimizer.step()
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0]["step"] = torch.tensor(2.0**24).share_memory_()
    optimizer.load_state_dict(checkpoint)
    for _ in range(3):
        optimizer.step()
    assert float(optimizer.state[param]["step"]) == 2**24 + 3
