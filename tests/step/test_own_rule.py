"""A user's own rule has all that built-in ones have; a wrong one is an error before any write."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from cases import DEVICE, SPECS, Tensors, assert_no_worse, assert_same_bits, double, new_param
from fake_graph import fake_cuda
from lion import Lion, lion_reference, lion_rule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import triton_optim
from triton_optim import FusedOptimizer, RowWise, Rule, StateTensor
from triton_optim.launch.launcher import record_launches

FEW = SPECS[:3]
ROGUE = triton_optim.flag("ROGUE")


class Reference(Lion):
    """Steps in torch's operations."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **{**kwargs, "fused": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lion_is_its_reference(dtype: torch.dtype) -> None:
    """No less exact, in one launch over groups with rates of their own."""
    runs: Any = [Tensors(dtype), Tensors(dtype), Tensors(dtype, double(dtype))]
    for tensors, make in zip(runs, (Lion, Reference, Reference), strict=True):
        half = len(tensors.params) // 2
        groups = [{"params": tensors.params[:half]}, {"params": tensors.params[half:], "lr": 0.05}]
        optimizer = make(groups, lr=0.01, weight_decay=0.1)
        with record_launches() as launches:
            tensors.train(optimizer, 3)
        aligned = {launch.variant for launch in launches}
        assert len(launches) == (0 if make is Reference else 3 * len(aligned))
    ours, theirs, exact = (tensors.params for tensors in runs)
    assert_no_worse(ours, theirs, exact, "parameter")


def test_clipping_and_scaler() -> None:
    ours, theirs = Tensors(torch.float32, specs=FEW), Tensors(torch.float32, specs=FEW)
    optimizer = Lion(ours.params, lr=0.01, fused=True, max_grad_norm=0.5)
    reference = Reference(theirs.params, lr=0.01)
    for skips in (False, True, False):
        for tensors in (ours, theirs):
            tensors.new_gradients()
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
        optimizer.grad_scale = torch.full((), 8.0, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.full((), float(skips), device=DEVICE)  # type: ignore[attr-defined]
        for grad in ours.grads:
            grad.mul_(8)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        if not skips:
            reference.step()
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_state_dict_there_and_back() -> None:
    ours, theirs = Tensors(torch.float32, specs=FEW), Tensors(torch.float32, specs=FEW)
    first = Lion(ours.params, lr=0.01)
    ours.train(first, 2)
    theirs.train(Lion(theirs.params, lr=0.01), 2)
    resumed, fallen_back = Lion(ours.params, lr=1.0), Reference(theirs.params, lr=1.0)
    for optimizer in (resumed, fallen_back):
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [*first.state_dict()["state"][0]] == ["step", "exp_avg"]
    assert resumed.param_groups[0]["lr"] == 0.01
    ours.train(resumed, 2)
    theirs.train(fallen_back, 2)
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q)


def test_step_in_backward() -> None:
    model, other = (torch.nn.Linear(4, 3, device=DEVICE) for _ in range(2))
    other.load_state_dict(model.state_dict())
    triton_optim.step_in_backward(model, Lion(model.parameters(), lr=0.1))
    optimizer = Lion(other.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(2, 4, device=DEVICE)
        model(x).square().sum().backward()
        other(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits([*model.parameters()], [*other.parameters()])


@pytest.mark.skipif(DEVICE != "cpu", reason="pretends a GPU where there is none")
def test_replays_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    with fake_cuda(monkeypatch):
        for graphed in (True, False):
            torch.manual_seed(0)
            params = [new_param(5), new_param(70)]
            lr = torch.tensor(0.1, dtype=torch.float64)
            optimizer = Lion(params, lr=lr, capturable=True)
            optimizer.step()
            step = triton_optim.GraphedStep(optimizer) if graphed else optimizer.step
            for factor in (2.0, -1.0, 0.5):
                for param in params:
                    assert param.grad is not None
                    param.grad.mul_(factor).add_(0.1)
                lr.mul_(0.5)
                step()
            runs.append([params, optimizer.state_dict()["state"]])
    assert_same_bits(*runs)


def test_dtensors(tmp_path: Path) -> None:
    """Their local shards, in one launch: the bits of plain tensors."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh(DEVICE, [0])
        plain = [new_param(4, 3), new_param(7, 2)]
        sharded = []
        for param in plain:
            assert param.grad is not None
            on_mesh = DTensor.from_local(param.detach().clone(), mesh, [Shard(0)])
            sharded.append(Parameter(on_mesh))
            sharded[-1].grad = DTensor.from_local(param.grad.clone(), mesh, [Shard(0)])
        optimizers = [Lion(params, lr=0.1, fused=True) for params in (plain, sharded)]
        for optimizer in optimizers:
            for _ in range(2):
                with record_launches() as launches:
                    optimizer.step()
                assert len(launches) == 1
        assert_same_bits(plain, [param.to_local().detach() for param in sharded])  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def test_copies_and_defaults() -> None:
    param = new_param(5)
    optimizer = Lion([param], lr=0.5, max_grad_norm=2.0)
    again = type(optimizer)([param], **optimizer.defaults)
    assert again.max_grad_norm == 2.0
    assert again.param_groups[0]["lr"] == 0.5
    assert {*optimizer.param_groups[0]} == {"params", "lr", "beta1", "beta2", "weight_decay"}
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.5


def test_own_constructor_and_flag() -> None:
    class Rogue(FusedOptimizer):
        rule = Rule(_rogue_rule, (StateTensor("start", initial=3.0),), _rates, flags=_FLAGS)

        def __init__(self, params: Any, lr: float, rogue: bool = False, **options: Any) -> None:
            super().__init__(params, {"lr": lr, "rogue": rogue}, **options)

    for rogue, expected in ((False, 1 - 0.25 * 3), (True, -1.0)):
        param = Parameter(torch.ones(3, device=DEVICE))
        param.grad = torch.ones_like(param)
        optimizer = Rogue([param], lr=0.25, rogue=rogue)
        optimizer.step()
        assert param.tolist() == [expected] * 3


@pytest.mark.parametrize("hyperparameters", [{}, {"lr": 0.25}], ids=["none", "one"])
def test_few_hyperparameters(hyperparameters: dict[str, float]) -> None:
    class Halving(FusedOptimizer):
        rule = Rule(_halving_rule, hyperparameters=hyperparameters)

    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = Halving([param])
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.tolist() == [0.25] * 3
    assert float(optimizer.state[param]["step"]) == 2


def test_a_group_s_own_hyperparameter_is_followed() -> None:
    """Also one that the optimizer has no default of, and one that comes later."""

    class Decaying(FusedOptimizer):
        rule = Rule(_halving_rule, hyperparameters=lambda g: (g["lr"], g.get("rate", 0.0)))

        def __init__(self, params: Any, lr: float = 1.0) -> None:
            super().__init__(params, {"lr": lr})

    param = new_param(3)
    optimizer = Decaying([{"params": [param], "rate": 1.0}])
    for rate in (1.0, 2.0):
        optimizer.param_groups[0]["rate"] = rate
        optimizer.step()
        plan = optimizer._stepper.plan
        assert plan is not None
        assert plan._values.hyperparameters == [1.0, rate]


def test_state_by_row() -> None:
    """Made with the dtype and the value that the rule says, at the first sparse gradient."""

    class ByRow(FusedOptimizer):
        rows = RowWise(
            function=_counting_rows, state="rows", dtype=lambda _: torch.float32,
            initial=lambda _: 10.0,
        )  # fmt: skip
        rule = Rule(_halving_rule, hyperparameters={"lr": 1.0}, row_wise=rows)

    param = Parameter(torch.ones(4, 2, device=DEVICE))
    ids = torch.tensor([[1]], device=DEVICE)
    param.grad = torch.sparse_coo_tensor(ids, torch.ones(1, 2, device=DEVICE), (4, 2))
    optimizer = ByRow([param])
    optimizer.step()
    assert optimizer.state[param]["rows"].tolist() == [10.0, 11.0, 10.0, 10.0]
    assert param.tolist() == [[1, 1], [0.5, 0.5], [1, 1], [1, 1]]


def test_more_states_than_rows_have(launches: list[object]) -> None:
    class Wide(FusedOptimizer):
        rule = replace(Lion.rule, state=("a", "b", "c"), row_wise=RowWise())

    params = [Parameter(torch.ones(4, 2, device=DEVICE)) for _ in range(8)]
    for param in params:
        param.grad = torch.ones(4, 2, device=DEVICE).to_sparse(1)
    with pytest.raises(RuntimeError, match="its rows have more states than 2"):
        Wide(params, fused=True).step()


def test_a_fallback_leaves_the_groups_alone() -> None:
    """Buckets of other devices may step in another thread meanwhile."""
    seen: list[int] = []

    def reference(param: Any, grad: Any, state: Any, group: Any) -> None:
        seen.append(sum(len(group["params"]) for group in optimizer.param_groups))
        lion_reference(param, grad, state, group)

    class Watching(FusedOptimizer):
        rule = replace(Lion.rule, reference=reference)

    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, device=DEVICE) for _ in range(2)))
    optimizer = Watching(model.parameters(), fused=False)
    triton_optim.step_in_backward(model, optimizer, bucket_bytes=0)
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    assert seen == [4] * 4
    assert len(optimizer.state) == 4


def test_classes_that_users_make() -> None:
    class Abstract(FusedOptimizer):
        pass

    with pytest.raises(TypeError, match="Abstract has no rule"):
        Abstract([new_param(3)])

    class Mixin(torch.optim.Optimizer):
        pass

    class Mixed(Mixin, triton_optim.SGD):
        pass

    assert Mixed([new_param(3)], fused=True).param_groups[0]["fused"]

    class Own(triton_optim.SGD):
        def __init__(self, params: Any, rate: float, **kwargs: Any) -> None:
            super().__init__(params, lr=rate, **kwargs)
            self._step = 0

    assert [*inspect.signature(Own).parameters] == ["params", "rate", "kwargs"]
    own = Own([new_param(3)], 0.5, momentum=0.9)
    own.step()
    assert own._step == 0
    assert [*own.defaults][-5:] == [
        "capturable", "max_grad_norm", "error_if_nonfinite", "skip_nonfinite",
        "decoupled_weight_decay",
    ]  # fmt: skip
    expected = ["params", "lr", "beta1", "beta2", "weight_decay", "fused", "capturable"]
    assert [*inspect.signature(Lion).parameters][:7] == expected


def test_arguments_that_there_are_not() -> None:
    with pytest.raises(TypeError, match=r"unexpected .* 'momentum'; .*lr"):
        Lion([new_param(3)], momentum=0.9)
    with pytest.raises(TypeError, match=r"Lion\(params, ...\) got 0.001"):
        Lion([new_param(3)], 1e-3)
    for function in (lion_reference, _too_few_arguments):
        with pytest.raises(TypeError, match=r"give a @triton\.jit"):
            Rule(function)
    with pytest.raises(ValueError, match="needs counts_step=True"):
        Rule(lion_rule, reads_step=True, counts_step=False)
    for state in (("a", "b", "c", "d"), ("a", "a"), ("step",)):
        with pytest.raises(ValueError, match="takes up to 3, each named once"):
            Rule(lion_rule, state)

    class Nameless(FusedOptimizer):
        rule = Rule(_rogue_rule, ("start",), _rates, flags=_FLAGS)

    with pytest.raises(TypeError, match="_rogue_rule asks a parameter group for 'rogue'"):
        Nameless([new_param(3)], {"lr": 1.0})

    class Unflagged(FusedOptimizer):
        rule = replace(Lion.rule, flags={"UNHEARD_OF": lambda _: True})

    with pytest.raises(ValueError, match=r"UNHEARD_OF = triton_optim.flag\('UNHEARD_OF'\)"):
        Unflagged([new_param(3)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": ("exp_avg", "other")},
        {"state": ()},
        {"hyperparameters": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99}},
    ],
    ids=["too few states returned", "no state", "too few hyperparameters"],
)
def test_functions_that_do_not_fit(wrong: dict[str, Any]) -> None:
    class Wrong(FusedOptimizer):
        rule = replace(Lion.rule, **wrong)

    params = [new_param(5), new_param(7)]
    before = [param.detach().clone() for param in params]
    optimizer = Wrong(params)
    with pytest.raises(RuntimeError, match=r"lion_rule failed: [\s\S]*It is given param, grad"):
        optimizer.step()
    assert_same_bits(params, before)
    assert not optimizer.state


def test_without_reference() -> None:
    class Bare(FusedOptimizer):
        rule = replace(Lion.rule, reference=None)

    param = new_param(3)
    optimizer = Bare([param], fused=False)
    with pytest.raises(RuntimeError, match=r"no kernel can step parameter 0 .*Rule.reference"):
        optimizer.step()


_FLAGS = {"ROGUE": lambda group: group["rogue"]}


def _rates(group: dict[str, Any]) -> tuple[float]:
    return (group["lr"],)


@triton.jit  # type: ignore[untyped-decorator]
def _rogue_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):  # type: ignore[no-untyped-def]
    if ROGUE & FLAGS:
        param = param * 0 - 1
    else:
        param -= hyper[0] * state[0]
    return param, state


@triton.jit  # type: ignore[untyped-decorator]
def _halving_rule(param, grad, state, hyper, step, FLAGS: tl.constexpr):  # type: ignore[no-untyped-def]
    return param / 2, state


@triton.jit
def _counting_rows(param, grad, state, row_state, width, hyper, step, FLAGS):  # type: ignore[no-untyped-def]
    return param / 2, state, row_state + 1


@triton.jit
def _too_few_arguments(param, grad):  # type: ignore[no-untyped-def]
    return param
