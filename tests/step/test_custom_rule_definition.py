"""What a user's rule and class may define, and the errors of those that do not fit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from assertions import assert_same_bits
from cases import DEVICE, new_param
from lion import Lion, lion_reference, lion_rule
from torch.nn import Parameter

import triton_optim
from triton_optim import FusedOptimizer, RowWise, Rule, StateTensor

ROGUE = triton_optim.flag("ROGUE")


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


ROGUE_RULE = Rule(
    _rogue_rule,
    (StateTensor("start", initial=3.0),),
    lambda group: (group["lr"],),
    flags={"ROGUE": lambda group: group["rogue"]},
)


def test_own_constructor_and_flag() -> None:
    class Rogue(FusedOptimizer):
        rule = ROGUE_RULE

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
    assert [*own.defaults][-9:] == [
        "capturable", "max_grad_norm", "error_if_nonfinite", "skip_nonfinite",
        "decoupled_weight_decay", "master_weight_bits", "stochastic_rounding", "rounding_seed",
        "state_dtype",
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
        rule = ROGUE_RULE

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
