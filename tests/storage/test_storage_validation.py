"""Options of storage that contradict each other, or do nothing, are refused before a write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_same_bits, raises
from cases import DEVICE, new_param
from lion import Lion
from torch import Tensor
from torch.nn import Embedding, Parameter

import triton_optim
from triton_optim import fp32_state_dict, load_fp32_state_dict
from triton_optim.rule import Rule

BFLOAT16 = torch.bfloat16


def param(dtype: torch.dtype = BFLOAT16, *shape: int) -> Parameter:
    made = Parameter(torch.ones(shape or (5,), dtype=dtype, device=DEVICE))
    made.grad = torch.ones_like(made)
    return made


REFUSED: list[tuple[torch.dtype, dict[str, Any], type[Exception], str]] = [
    (BFLOAT16, {"master_weight_bits": 16}, ValueError, "32 keeps float32 values"),
    (
        BFLOAT16,
        {"master_weight_bits": 32, "stochastic_rounding": True},
        ValueError,
        "rounds no parameter, .* choose",
    ),
    (torch.float32, {"master_weight_bits": 32}, ValueError, "no parameter is bfloat16"),
    (torch.float16, {"master_weight_bits": 32}, ValueError, "16 bits beside a float16"),
    (torch.float32, {"stochastic_rounding": True}, ValueError, "no parameter is bfloat16 or"),
    (BFLOAT16, {"rounding_seed": 1}, ValueError, "nothing is rounded stochastically"),
    (BFLOAT16, {"stochastic_rounding": True, "rounding_seed": 1.0}, TypeError, "give an int"),
    (BFLOAT16, {"stochastic_rounding": True, "rounding_seed": True}, TypeError, "give an int"),
    (BFLOAT16, {"stochastic_rounding": True, "rounding_seed": 2**63}, ValueError, "64 bits"),
    (BFLOAT16, {"state_dtype": torch.int8}, ValueError, "Invalid state_dtype value: torch.int8"),
    (BFLOAT16, {"state_dtype": "8bits"}, ValueError, "Invalid state_dtype value: '8bits'"),
    (BFLOAT16, {"state_dtype": [BFLOAT16]}, ValueError, r"Invalid state_dtype value: \[torch"),
    (
        BFLOAT16,
        {"state_dtype": torch.float16},
        ValueError,
        "float16 holds no squares .*'exp_avg_sq",
    ),
    (BFLOAT16, {"state_dtype": {"max_exp_avg_sq": BFLOAT16}}, ValueError, "names 'max_exp_avg_sq'"),
    (BFLOAT16, {"amsgrad": True, "state_dtype": "8bit"}, ValueError, "the state 'max_exp_avg_sq'"),
    (BFLOAT16, {"max_grad_norm": 1.0, "skip_nonfinite": "no"}, TypeError, "give True or False"),
    (BFLOAT16, {"state_dtype": {"exp": BFLOAT16}}, ValueError, r"names 'exp', .*\['exp_avg'"),
    (torch.complex64, {"state_dtype": BFLOAT16}, ValueError, "state_dtype takes real ones"),
]


@pytest.mark.parametrize(("dtype", "kwargs", "error", "message"), REFUSED)
def test_by_the_constructor(
    dtype: torch.dtype, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        triton_optim.AdamW([param(dtype)], **kwargs)


@pytest.mark.parametrize("make", [torch.optim.SGD, triton_optim.SGD], ids=["torch", "ours"])
def test_float32_weights_of_an_optimizer_that_has_none(make: Any) -> None:
    model = torch.nn.Linear(2, 2).bfloat16()
    optimizer = make(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"SGD has no float32 values .* master_weight_bits=32"):
        fp32_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="SGD has no float32 values"):
        load_fp32_state_dict(model, optimizer, torch.nn.Linear(2, 2).state_dict())
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("dtype", [BFLOAT16, "8bit"], ids=str)
def test_state_that_is_not_kept(dtype: Any) -> None:
    with pytest.raises(ValueError, match="these options keep no state; leave it out"):
        triton_optim.SGD([param()], state_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, "8bit"], ids=str)
def test_a_rule_that_does_not_say_what_its_state_is(dtype: Any) -> None:
    """Divided by, small numbers of such state count; taken for a signed one they become 0."""
    with pytest.raises(ValueError, match=r"StateTensor\('exp_avg', is_denominator=...\)"):
        Lion([param()], state_dtype=dtype)
    Lion([param()], state_dtype=BFLOAT16)


def test_a_dict_that_changes_later() -> None:
    asked = {"exp_avg": BFLOAT16}
    optimizer = triton_optim.AdamW([param(torch.float32)], state_dtype=asked)
    asked.clear()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == BFLOAT16


def test_in_a_group() -> None:
    with pytest.raises(ValueError, match="master_weight_bits is for the whole optimizer"):
        triton_optim.SGD([{"params": [param()], "master_weight_bits": 32}])
    optimizer = triton_optim.SGD([param()], master_weight_bits=32)
    with pytest.raises(ValueError, match="16 bits beside a float16"):
        optimizer.add_param_group({"params": [param(torch.float16)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [param(torch.float32)]})  # exact as it is
    optimizer.step()


def test_no_state_of_a_rule_is_named_like_a_remainder() -> None:
    with pytest.raises(ValueError, match="none of them 'step' or 'param_remainder'"):
        Rule(None, state=("param_remainder",))


FALLBACKS: list[tuple[dict[str, Any], str]] = [
    ({"master_weight_bits": 32}, "master_weight_bits=32"),
    ({"stochastic_rounding": True}, "stochastic_rounding=True"),
    ({"state_dtype": torch.float32}, "state_dtype=torch.float32"),
    ({"state_dtype": {"square_avg": torch.float32}}, "state_dtype={'square_avg': torch.float32}"),
]


@pytest.mark.parametrize(("kwargs", "option"), FALLBACKS, ids=str)
@pytest.mark.parametrize("way", ["fused=False", "foreach=True"])
def test_torch_cannot_step_so(kwargs: dict[str, Any], option: str, way: str) -> None:
    name, _, value = way.partition("=")
    tensors, kwargs = [param()], {**kwargs, name: value == "True"}
    optimizer: Any = triton_optim.RMSprop(tensors, **kwargs)
    with raises(
        f"{option}, but the kernels cannot take parameter 0 of group 0", optimizer, tensors
    ):
        optimizer.step()


@pytest.mark.parametrize(("kwargs", "option"), FALLBACKS[:2], ids=str)
def test_nor_is_it_done_by_rows(kwargs: dict[str, Any], option: str) -> None:
    table = Embedding(9, 4, sparse=True, dtype=BFLOAT16, device=DEVICE)
    table(torch.tensor([1, 3], device=DEVICE)).sum().backward()
    optimizer: Any = triton_optim.SGD(table.parameters(), **kwargs)
    with raises(
        f"{option}, but parameter 0 of group 0 is updated by rows", optimizer, [table.weight]
    ):
        optimizer.step()


def test_state_of_rows_has_one_dtype() -> None:
    table = Embedding(9, 4, sparse=True, dtype=torch.float32, device=DEVICE)
    table(torch.tensor([1, 3], device=DEVICE)).sum().backward()
    optimizer = triton_optim.Adagrad(
        table.parameters(), state_dtype=BFLOAT16, stochastic_rounding=False
    )
    optimizer.step()
    assert optimizer.state[table.weight]["sum"].dtype == BFLOAT16


BAD_REMAINDERS: list[tuple[Any, str]] = [
    (torch.zeros(4, dtype=torch.int16), r"has shape \(4,\)"),
    (torch.zeros(5, dtype=torch.int32), "is torch.int32, and the optimizer's options ask for"),
    (torch.zeros(5, dtype=torch.bool), "is torch.bool, and the optimizer's options ask for"),
    (None, "is None"),
]


@pytest.mark.parametrize(("remainder", "message"), BAD_REMAINDERS, ids=str)
@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize("cls", [triton_optim.Adagrad, triton_optim.AdamW])
def test_a_remainder_that_does_not_fit(
    cls: Any, remainder: Tensor | None, message: str, loads: bool
) -> None:
    tensors = [param()]
    optimizer = cls(tensors, master_weight_bits=32)
    optimizer.step()
    bad = remainder if remainder is None else remainder.to(DEVICE)
    if loads:
        saved = optimizer.state_dict()
        saved["state"][0]["param_remainder"] = bad
        with raises(
            f"state 'param_remainder' of .* {message}", cls(tensors, master_weight_bits=32), tensors
        ):
            cls(tensors, master_weight_bits=32).load_state_dict(saved)
    else:
        optimizer.state[tensors[0]]["param_remainder"] = bad
        with pytest.raises(RuntimeError, match=f"state 'param_remainder' of .* {message}"):
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_that_is_converted_later(dtype: torch.dtype) -> None:
    """Its remainders would be lost in silence."""
    model = torch.nn.Linear(3, 2, device=DEVICE, dtype=BFLOAT16)
    optimizer = triton_optim.RMSprop(model.parameters(), master_weight_bits=32)
    for _ in range(2):
        model(torch.ones(1, 3, device=DEVICE, dtype=model.weight.dtype)).sum().backward()
        if model.weight.dtype == BFLOAT16:
            optimizer.step()
        optimizer.zero_grad()
        model.to(dtype)
    model(torch.ones(1, 3, device=DEVICE, dtype=dtype)).sum().backward()
    with raises(f"is {dtype} now.*fp32_state_dict", optimizer, [*model.parameters()]):
        optimizer.step()


def test_state_of_another_dtype_than_asked_for() -> None:
    tensors = [new_param(5)]
    optimizer = triton_optim.AdamW(tensors, state_dtype=BFLOAT16)
    optimizer.step()
    state = optimizer.state[tensors[0]]
    state["exp_avg"] = state["exp_avg"].float()
    with pytest.raises(
        RuntimeError, match=r"is torch\.float32, and the optimizer's options ask for"
    ):
        optimizer.step()
