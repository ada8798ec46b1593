"""State of one number a tensor beside its step: NAdam's `mu_product`, ASGD's `eta` and `mu`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits, updates_among
from cases import (
    CASES,
    DEVICE,
    SCALARS,
    Case,
    Spec,
    Tensors,
    as_saved,
    copies_of,
    each,
    new_param,
    scaled_step,
)
from paired_models import PairedModels
from paired_optimizers import Pair
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.launch.launcher import record_launches

SCALAR_CASES = tuple(c for c in CASES if c.name in ("nadam", "nadam-all", "asgd-all"))
SPECS = (
    Spec("a", lambda draw: draw(3)),
    Spec("b", lambda draw: draw(5)),
    Spec("empty", lambda draw: draw(0)),
    Spec("c", lambda draw: draw(7)),
)

every_case = each(SCALAR_CASES)


def _scalars(optimizer: Any) -> list[Tensor]:
    states = optimizer.state.values()
    return [value for state in states for name, value in state.items() if name in SCALARS]


@every_case
@pytest.mark.parametrize("option", ["skip_nonfinite", "fused"])
def test_the_device_counts_as_the_host_does(case: Case, option: str) -> None:
    """Steps that are skipped advance nothing; then the bits of a run without them."""
    counted, plain = Tensors(torch.float32, specs=SPECS), Tensors(torch.float32, specs=SPECS)
    options = {"fused": True} if option == "fused" else {option: True, "max_grad_norm": 1e9}
    optimizer, other = case.ours(counted.params, **options), case.ours(plain.params)
    for skips in (True, False, False, True, False, False):
        counted.new_gradients()
        for p, q in zip(plain.params, counted.params, strict=True):
            q.grad = None if p is plain.params[1] and skips else q.grad
            p.grad = None if q.grad is None else q.grad.clone()
        if not skips:
            other.step()
        elif option == "skip_nonfinite":
            counted.grads[0][1] = torch.inf
        scaled_step(optimizer, float(skips)) if option == "fused" else optimizer.step()
    assert_same_bits(counted.params, plain.params)
    assert len(_scalars(optimizer)) >= 2 * len(SPECS)
    assert_same_bits(_scalars(optimizer), _scalars(other))


@every_case
@pytest.mark.parametrize("moves", [False, True])
def test_loaded_where_the_device_counts(case: Case, moves: bool) -> None:
    """A host's checkpoint, and back; `moves`: the device has skipped a step before."""
    params = [new_param(3), new_param(5)]
    optimizer, twins = case.ours(params), copies_of(params)
    twin = case.ours(twins)
    for moved in (True, False):
        for _ in range(2):
            optimizer.step()
            twin.step()
        options = {"fused": True} if moved else {}
        other = case.ours(params, **options)
        state_dict = copy.deepcopy(optimizer.state_dict())
        other.load_state_dict(state_dict)
        optimizer = other
        if moved and moves:
            scaled_step(optimizer, 1.0)
    with record_launches() as launches:
        optimizer.step()
    twin.step()
    assert len(updates_among(launches)) == 1
    assert_same_bits(params, twins)
    assert_same_bits(optimizer.state_dict()["state"], twin.state_dict()["state"])


@every_case
def test_missing_gradients(case: Case) -> None:
    """What has none keeps its scalars, and goes on from them; groups differ in arguments."""
    pair = Pair(case, lambda params: [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}])
    for without in ((), (0,), (1, 2), (0, 3), (), (0, 1, 2, 3), ()):
        pair.step(without=without)


@every_case
def test_in_backward(case: Case) -> None:
    pair = PairedModels(case)
    with pair.handle:
        pair.step(3)
    pair.as_ever()


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], str], object], str]] = {
    "missing": (lambda e, n: e.pop(n), "is None"),
    "list": (lambda e, n: e.update({n: [1.5]}), r"is \[1.5\]"),
    "two": (lambda e, n: e.update({n: torch.ones(2)}), "is tensor"),
    "complex": (lambda e, n: e.update({n: torch.ones((), dtype=torch.cfloat)}), "is tensor"),
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", ["mu_product", "mu"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_loaded(name: str, damage: str) -> None:
    (inflict, message), case = DAMAGES[damage], SCALAR_CASES[0 if name == "mu_product" else 2]
    params = [new_param(3), new_param(5)]
    optimizer = case.ours(params)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    inflict(checkpoint["state"][1], name)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=f"state '{name}' of parameter 1 of group 0 {message}"):
        optimizer.load_state_dict(checkpoint)
    assert_same_bits(optimizer.state_dict()["state"], before["state"])
    inflict(optimizer.state[params[1]], name)
    optimizer.add_param_group({"params": [new_param(1)]})  # the state is looked at again
    with pytest.raises(RuntimeError, match=f"state '{name}' of parameter 1 of group 0 {message}"):
        optimizer.step()
    assert_same_bits(optimizer.state[params[0]], before["state"][0])


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_loading_keeps_their_dtype(case: Case, dtype: torch.dtype) -> None:
    """So that a resumed run has the bits of one that was not interrupted; torch casts them."""
    straight, resumed = (Tensors(dtype, specs=SPECS) for _ in range(2))
    optimizers = [case.ours(tensors.params) for tensors in (straight, resumed)]
    for tensors, optimizer in zip((straight, resumed), optimizers, strict=True):
        tensors.train(optimizer, 2)
    again = case.ours(resumed.params)
    again.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    straight.train(optimizers[0], 2)
    resumed.train(again, 2)
    assert_same_bits(resumed.params, straight.params)
    assert_same_bits(again.state_dict()["state"], optimizers[0].state_dict()["state"])


@every_case
def test_double_scalars_stay_double(case: Case) -> None:
    """Those of a checkpoint that torch has cast, or that was made with another default dtype."""
    pair = Pair(case)
    pair.step(2)
    saved = copy.deepcopy(pair.optimizers[1].state_dict())
    for state in saved["state"].values():
        state.update({k: v.double() for k, v in state.items() if k in SCALARS - {"step"}})
    for optimizer in pair.optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved))
    pair.step(2)


@every_case
def test_torch_goes_on_from_ours(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    ours, theirs = (copy.deepcopy(o.state_dict()) for o in pair.optimizers)
    pair.optimizers[0].load_state_dict(theirs)
    pair.optimizers[1].load_state_dict(ours)
    as_saved(pair.optimizers[1])
    pair.step(2)


def test_a_later_rate_of_asgd() -> None:
    """Counts from the update after the next, as in torch."""
    pair = Pair(Case("asgd", "ASGD", {"lr": 0.1, "lambd": 0.1, "t0": 2.0}))
    for rate in (0.1, 0.05, 0.2, 0.01):
        for optimizer in pair.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        pair.step()


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_where_the_device_counts_a_step_is_two_launches(name: str) -> None:
    """The one that counts and advances, and the update."""
    param = new_param(5)
    optimizer = getattr(triton_optim, name)([param], fused=True)
    scaled_step(optimizer, 0.0)
    with record_launches() as launches:
        scaled_step(optimizer, 0.0)
    assert [launch.name for launch in launches] == ["count_kernel", "multi_tensor_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_replays_advance(name: str) -> None:
    params = [Parameter(torch.ones(5, device=DEVICE)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    rate = torch.full((), 0.01, dtype=torch.float64, device=DEVICE)
    captured = getattr(triton_optim, name)(params[:1], lr=rate, capturable=True)
    plain = getattr(triton_optim, name)(params[1:], lr=0.01)
    for optimizer in (captured, plain):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        plain.step()
    assert_same_bits(params[0], params[1])
