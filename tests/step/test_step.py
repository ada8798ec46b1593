"""What a training program does between two steps: each time as torch's for-loop would."""

from __future__ import annotations

import weakref

import pytest
import torch
from cases import CASES, DEVICE, Case, every_state, grad_of, skip_without_late_state
from paired_optimizers import Pair, two_groups
from torch.nn import Parameter

from triton_optim.launch.variant import Variant
from triton_optim.step import view


@every_state
def test_groups_have_their_own_hyperparameters(case: Case, launches: list[Variant]) -> None:
    Pair(case, two_groups).step(3)
    assert len(launches) == 3


@every_state
def test_gradients_that_stay_in_place(case: Case, launches: list[Variant]) -> None:
    pair = Pair(case)
    pair.step()
    for _ in range(3):
        for optimizer, tensors in zip(pair.optimizers, pair.tensors, strict=True):
            optimizer.zero_grad(set_to_none=False)
            for param in tensors.params:
                grad_of(param).add_(tensors.draw(*param.shape))
            optimizer.step()
        pair.check()
    assert len(launches) == 4


@every_state
def test_param_data_reassigned(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    pair.each(lambda _, params: setattr(params[1], "data", params[1].data.clone() + 1))
    pair.step(2)


@every_state
def test_state_moved_by_data_assignment(case: Case) -> None:
    """The widespread way to offload: state tensors keep their identity and lose their memory."""
    pair = Pair(case)
    pair.step(2)

    def offload_and_back(optimizer: torch.optim.Optimizer, _: list[Parameter]) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                value.data = value.data.clone()

    pair.each(offload_and_back)
    pair.step(2)


@every_state
def test_steps_moved_by_data_assignment(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    for value in (torch.tensor(50.0), torch.tensor(7.0, dtype=torch.float64)):
        for optimizer in pair.optimizers:
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].data = value.clone()
        pair.step(2)


@every_state
def test_state_that_is_moved_away_frees_its_memory(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    optimizer, param = pair.optimizers[0], pair.tensors[0].params[1]
    for key in set(optimizer.state.get(param, {})) - {"step"}:
        gone = weakref.ref(optimizer.state[param][key])
        optimizer.state[param][key] = optimizer.state[param][key].clone()
        assert gone() is None


@every_state
def test_default_device_is_not_the_tables(case: Case) -> None:
    pair = Pair(case)
    with torch.device("meta"):
        for optimizer, tensors in zip(pair.optimizers[:1], pair.tensors[:1], strict=True):
            for param in tensors.params:
                param.grad = torch.ones_like(param)
            optimizer.step()


@every_state
def test_state_replaced_and_removed(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)

    def replace(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> None:
        for key, value in optimizer.state.get(params[0], {}).items():
            optimizer.state[params[0]][key] = value.clone() * 2
        if "adagrad" not in case.name:
            optimizer.state.pop(params[1], None)

    pair.each(replace)
    pair.step(2)


@every_state
def test_hyperparameters_change_between_steps(case: Case, launches: list[Variant]) -> None:
    pair = Pair(case, two_groups)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in pair.optimizers]
    for _ in range(3):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.each(lambda optimizer, _: optimizer.param_groups[0].update(weight_decay=0.3))
    pair.step()
    pair.each(lambda optimizer, _: optimizer.param_groups[1].update(maximize=True))
    pair.step()
    assert len(set(launches)) <= 2  # no variant for a value, one for a flag


def test_momentum_switched_on_and_off() -> None:
    pair = Pair(CASES[0])
    for momentum in (0.0, 0.9, 0.0, 0.5):
        pair.each(lambda optimizer, _, m=momentum: optimizer.param_groups[0].update(momentum=m))  # type: ignore[misc]
        pair.step(2)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("SGD", "momentum", 0.9), ("Adagrad", "lr_decay", 0.5)]
)
def test_a_tensor_filled_in_place_switches_a_flag(name: str, key: str, value: float) -> None:
    pair = Pair(Case(name, name, {"lr": 0.1}))
    zero = torch.zeros((), dtype=torch.float64)  # torch computes in its dtype
    pair.each(lambda optimizer, _: optimizer.param_groups[0].update({key: zero.clone()}))
    pair.step(2)
    pair.each(lambda optimizer, _: optimizer.param_groups[0][key].fill_(value))
    pair.step(2)


@every_state
def test_a_rate_on_the_device_that_becomes_a_number(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is sent, though it is the one that stood in the tensor's place before."""
    if DEVICE == "cpu":  # a tensor here stands for one on a GPU
        monkeypatch.setattr(view, "as_scalar", lambda value: value)
    param = Parameter(torch.ones(5, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = case.ours([param])
    group = optimizer.param_groups[0]
    for rate in (0.5, 0.0, torch.tensor(0.5, device=DEVICE), 0.0, 0.0, 0.25):
        before = param.detach().clone()
        group["lr"] = rate
        optimizer.step()
        assert torch.equal(param, before) == (float(rate) == 0)


def test_a_default_that_no_group_has() -> None:
    pair = Pair(CASES[0])
    pair.each(lambda optimizer, _: optimizer.defaults.update(of_a_subclass=1))
    pair.step(2)


@every_state
def test_add_param_group(case: Case) -> None:
    skip_without_late_state(case)
    pair = Pair(case, lambda params: params[:2])
    for tensors in pair.tensors:
        tensors.new_gradients()
    pair.step(2)
    pair.each(lambda o, params: o.add_param_group({"params": params[2:], "lr": 0.5}))
    pair.step(2)


@every_state
def test_param_list_edited_in_place(case: Case) -> None:
    pair = Pair(case, two_groups)
    pair.step(2)
    pair.each(lambda o, _: o.param_groups[0]["params"].append(o.param_groups[1]["params"].pop()))
    pair.step(2)
    # The order of all parameters stays, the groups' border moves.
    pair.each(lambda o, _: o.param_groups[1]["params"].insert(0, o.param_groups[0]["params"].pop()))
    pair.step(2)


@every_state
def test_autograd_sees_that_tensors_were_written(case: Case) -> None:
    pair = Pair(case)
    optimizer, params = pair.optimizers[0], pair.tensors[0].params
    pair.step(2)
    states = [v for state in optimizer.state.values() for v in state.values()]
    versions = [tensor._version for tensor in (*params, *states)]
    loss = (params[0] * params[0]).sum()
    pair.step()
    assert all(t._version > v for t, v in zip((*params, *states), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_state
def test_a_parameter_listed_twice_steps_twice(case: Case) -> None:
    with pytest.warns(UserWarning, match="duplicate parameters"):
        pair = Pair(case, lambda params: [*params, params[0]])
    pair.step(3)
