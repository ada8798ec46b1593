"""What a training program does between two steps: each time as torch's for-loop would."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BLOCK, CASES, STATEFUL_CASES, Case, Spec, Tensors, assert_same_bits
from torch.nn import Parameter

import triton_optim
from triton_optim import runtime

SPECS = (
    Spec("a", lambda draw: draw(5)),
    Spec("b", lambda draw: draw(BLOCK + 1)),
    Spec("c", lambda draw: draw(3, 4)),
    Spec("d", lambda draw: draw()),
)
every_state = pytest.mark.parametrize("case", STATEFUL_CASES, ids=lambda case: case.name)


class Pair:
    """Our optimizer and torch's, led through the same program in float64."""

    def __init__(self, case: Case, groups: Callable[[list[Parameter]], Any] = list) -> None:
        self.case = case
        self.tensors = (Tensors(torch.float64, specs=SPECS), Tensors(torch.float64, specs=SPECS))
        ours, theirs = (tensors.params for tensors in self.tensors)
        self.optimizers = [case.ours(groups(ours)), case.theirs(groups(theirs))]

    def each(self, change: Callable[[torch.optim.Optimizer, list[Parameter]], object]) -> None:
        for optimizer, tensors in zip(self.optimizers, self.tensors, strict=True):
            change(optimizer, tensors.params)

    def step(self, times: int = 1, without: tuple[int, ...] = ()) -> None:
        """Step with new gradients, but none for some parameters; then compare everything."""
        for _ in range(times):
            for optimizer, tensors in zip(self.optimizers, self.tensors, strict=True):
                tensors.new_gradients()
                for i in without:
                    tensors.params[i].grad = None
                optimizer.step()
            self.check()

    def check(self) -> None:
        ours, theirs = self.optimizers
        for p, q in zip(*(tensors.params for tensors in self.tensors), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            assert (p in ours.state) == (q in theirs.state)
            assert list(ours.state.get(p, {})) == list(theirs.state.get(q, {}))
            for key, value in ours.state.get(p, {}).items():
                torch.testing.assert_close(value, theirs.state[q][key], rtol=1e-12, atol=1e-12)


def _two_groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.003, "weight_decay": 0.1}]


@every_state
def test_groups_have_their_own_hyperparameters(case: Case, launches: list[runtime.Variant]) -> None:
    Pair(case, _two_groups).step(3)
    assert len(launches) == 3


@every_state
def test_gradients_come_and_go(case: Case) -> None:
    pair = Pair(case)
    for without in ((0,), (0, 1, 2, 3), (), (2,), (1, 3), ()):
        pair.step(2, without)


@every_state
def test_frozen_and_unfrozen(case: Case) -> None:
    pair = Pair(case)
    pair.each(lambda _, params: params[1].requires_grad_(False))
    pair.step(2, without=(1,))
    pair.each(lambda _, params: params[1].requires_grad_(True))
    pair.step(2)


@every_state
def test_gradients_that_stay_in_place(case: Case, launches: list[runtime.Variant]) -> None:
    pair = Pair(case)
    pair.step()
    for _ in range(3):
        for optimizer, tensors in zip(pair.optimizers, pair.tensors, strict=True):
            optimizer.zero_grad(set_to_none=False)
            for param in tensors.params:
                assert param.grad is not None
                param.grad.add_(tensors.draw(*param.shape))
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
def test_hyperparameters_change_between_steps(case: Case, launches: list[runtime.Variant]) -> None:
    pair = Pair(case, _two_groups)
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


@every_state
def test_learning_rate_as_a_tensor(case: Case) -> None:
    lr = case.kwargs["lr"]
    for shape in ((), (1,)):
        pair = Pair(case)
        rates = [torch.full(shape, lr, dtype=torch.float64) for _ in range(2)]
        for optimizer, rate in zip(pair.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
        pair.step(2)
        for rate in rates:
            rate.mul_(0.5)
        pair.step(2)


@every_state
def test_add_param_group(case: Case) -> None:
    pair = Pair(case, lambda params: params[:2])
    for tensors in pair.tensors:
        tensors.new_gradients()
    pair.step(2)
    pair.each(lambda o, params: o.add_param_group({"params": params[2:], "lr": 0.5}))
    pair.step(2)


@every_state
def test_param_list_edited_in_place(case: Case) -> None:
    pair = Pair(case, _two_groups)
    pair.step(2)
    pair.each(lambda o, _: o.param_groups[0]["params"].append(o.param_groups[1]["params"].pop()))
    pair.step(2)
    # The order of all parameters stays, the groups' border moves.
    pair.each(lambda o, _: o.param_groups[1]["params"].insert(0, o.param_groups[0]["params"].pop()))
    pair.step(2)


@every_state
def test_state_dict_to_torch_and_back(case: Case) -> None:
    pair = Pair(case, _two_groups)
    pair.step(3)
    file = io.BytesIO()
    torch.save([optimizer.state_dict() for optimizer in pair.optimizers], file)
    file.seek(0)
    ours, theirs = torch.load(file, weights_only=True)
    assert ours["state"].keys() == theirs["state"].keys()
    # Crossed: ours takes torch's checkpoint and torch's takes ours.
    pair.optimizers[0].load_state_dict(theirs)
    pair.optimizers[0].param_groups[0]["foreach"] = None
    pair.optimizers[0].param_groups[1]["foreach"] = None
    pair.optimizers[1].load_state_dict(ours)
    pair.step(3)


@every_state
def test_load_state_dict_in_mid_run(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    pair.step(2)
    for optimizer, state_dict in zip(pair.optimizers, saved, strict=True):
        optimizer.load_state_dict(state_dict)
    pair.step(2)


def test_state_dict_of_sgd_from_before_the_first_momentum() -> None:
    pair = Pair(next(case for case in CASES if case.name == "sgd-dampening"))
    pair.each(lambda o, params: o.state[params[0]].update(momentum_buffer=None))
    pair.step(3)


@every_state
def test_deepcopy_and_pickle(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    duplicates: list[Any] = [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
    for duplicate in duplicates:
        for i, tensors in enumerate(pair.tensors):
            optimizer = duplicate(pair.optimizers[i])
            pair.optimizers[i] = optimizer
            tensors.params = [p for group in optimizer.param_groups for p in group["params"]]
        pair.step(2)


def test_closure_hooks_and_order() -> None:
    calls: list[str] = []
    param = Parameter(torch.ones(3, device="cpu"))
    optimizer = triton_optim.SGD([param], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) == 3.0
    assert calls == ["pre", "closure", "post"]
    assert torch.equal(param, torch.zeros(3))


@every_state
def test_an_exception_in_the_closure_leaves_everything(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    before = copy.deepcopy(pair.optimizers[0].state_dict())

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.optimizers[0].step(closure)
    assert_same_bits(pair.optimizers[0].state_dict(), before)
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


@every_state
def test_named_parameters(case: Case) -> None:
    names = "abcd"
    pair = Pair(case, lambda params: list(zip(names, params, strict=True)))
    pair.step(2)
    assert pair.optimizers[0].state_dict()["param_groups"][0]["param_names"] == list(names)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop"])
def test_constructor_is_torchs(name: str) -> None:
    ours, theirs = getattr(triton_optim, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    signature, expected = inspect.signature(ours), inspect.signature(theirs)
    parameters = list(signature.parameters.values())
    if name == "RMSprop":
        fused = parameters.pop()
        assert (fused.name, fused.kind, fused.default) == ("fused", fused.KEYWORD_ONLY, None)
    found = [(p.name, p.kind, p.default) for p in parameters]
    assert found == [(p.name, p.kind, p.default) for p in expected.parameters.values()]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SGD", {"lr": -1.0}),
        ("SGD", {"momentum": -1.0}),
        ("SGD", {"weight_decay": -1.0}),
        ("SGD", {"nesterov": True}),
        ("SGD", {"lr": torch.ones(2)}),
        ("SGD", {"fused": True, "foreach": True}),
        ("SGD", {"fused": True, "differentiable": True}),
        ("Adagrad", {"lr_decay": -1.0}),
        ("Adagrad", {"initial_accumulator_value": -1.0}),
        ("Adagrad", {"eps": -1.0}),
        ("Adagrad", {"fused": True, "foreach": True}),
        ("RMSprop", {"alpha": -1.0}),
        ("RMSprop", {"momentum": -1.0}),
        ("RMSprop", {"unknown": 1}),
    ],
)
def test_constructor_refuses_as_torch_does(name: str, kwargs: dict[str, Any]) -> None:
    errors = []
    for module in (triton_optim, torch.optim):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
            getattr(module, name)([Parameter(torch.ones(1))], **kwargs)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("other", ["foreach", "differentiable", "capturable"])
def test_rmsprop_refuses_fused_beside(other: str) -> None:
    with pytest.raises(RuntimeError, match=f"`fused`.*`{other}`"):
        triton_optim.RMSprop([Parameter(torch.ones(1))], fused=True, **{other: True})


@every_state
def test_inside_a_compiled_program(case: Case) -> None:
    pair = Pair(case)
    steps: list[Any] = [optimizer.step for optimizer in pair.optimizers]
    steps[0] = torch.compile(steps[0], backend="eager")
    for _ in range(3):
        for tensors, step in zip(pair.tensors, steps, strict=True):
            tensors.new_gradients()
            step()
        pair.check()


@every_state
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(case: Case, fused: bool | None) -> None:
    """The scaler unscales before the step, and skips it on an infinite gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizers = [case.ours([params[0]], fused=fused), case.theirs([params[1]])]
    for factor in (1.0, float("inf"), 1.0):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.zero_grad()
            scaler.scale((param * factor).sum()).backward()
            scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(params[0], params[1])
    assert_same_bits(
        [list(s) for s in optimizers[0].state.values()],
        [list(s) for s in optimizers[1].state.values()],
    )
