"""What RMSprop's lazy rows do not go with, and damaged state: errors, with nothing written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_same_bits, raises
from embedding_tables import Tables, check_both, lazy_and_dense
from torch.nn import Parameter

import triton_optim


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 0.9}, "does not go with momentum"),
        ({"weight_decay": 0.1}, "does not go with weight_decay"),
        ({"foreach": True}, "does not go with foreach=True"),
        ({"differentiable": True}, "does not go with differentiable=True"),
        ({"fused": False}, "does not go with fused=False"),
        ({"max_grad_norm": 1.0}, "does not go with max_grad_norm"),
        ({"capturable": True}, "does not go with capturable=True"),
        ({"alpha": torch.tensor(0.9)}, "does not go with a tensor as alpha"),
        ({"sparse": "eager"}, "Invalid sparse value: 'eager'"),
    ],
    ids=str,
)
def test_what_it_excludes_raises_at_construction(kwargs: dict[str, Any], message: str) -> None:
    param = Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=message):
        triton_optim.RMSprop([param], **{"sparse": "lazy", **kwargs})
    optimizer = triton_optim.RMSprop([param], sparse="lazy")
    if "momentum" in kwargs or "weight_decay" in kwargs:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": Parameter(torch.ones(2)), **kwargs})
        assert len(optimizer.param_groups) == 1


def test_what_is_changed_into_that_later_raises_at_the_step() -> None:
    runs, optimizers = lazy_and_dense(steps=1)
    optimizers[0].param_groups[0]["weight_decay"] = 0.1
    runs[0].new_gradients([3])
    message = "sparse='lazy' cannot take parameter 0 of group 0: weight_decay, which moves every"
    with raises(message, optimizers[0], runs[0].params):
        optimizers[0].step()


@pytest.mark.parametrize("change", ["foreach", "momentum"])
def test_averages_that_lag_are_not_left_to_torch(change: str) -> None:
    runs, optimizers = lazy_and_dense(steps=1)
    (param,) = runs[0].params
    param.grad = torch.ones_like(param)
    optimizers[0].param_groups[0][change] = 0.5 if change == "momentum" else True
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        optimizers[0].step()
    assert_same_bits(param.detach(), before)
    if change == "foreach":
        saved = optimizers[0].state_dict()
        optimizers[0].load_state_dict(saved)
        optimizers[0].step()


def test_state_with_gaps_and_damaged_state() -> None:
    runs, optimizers = lazy_and_dense(steps=3)
    (param,) = runs[0].params
    state = optimizers[0].state[param]
    wide = torch.cat((state["square_avg"], torch.full_like(param, 7.0)), 1)
    state["square_avg"] = wide[:, :4]
    check_both(runs, optimizers)
    assert (wide[:, 4:] == 7).all()
    state["last_step"] = state["last_step"][:-1]
    with pytest.raises(
        RuntimeError, match=r"state 'last_step' of parameter 0 of group 0 has shape"
    ):
        optimizers[0].state_dict()


def test_it_does_not_step_in_backward() -> None:
    model = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = triton_optim.RMSprop(model.parameters(), sparse="lazy")
    with pytest.raises(RuntimeError, match="sparse='lazy' makes good what rows missed"):
        triton_optim.step_in_backward(model, optimizer)


def test_a_bad_alpha_is_mended() -> None:
    tables = Tables([(9, 4)])
    optimizer = triton_optim.RMSprop(tables.params, sparse="lazy")
    tables.new_gradients([2])
    optimizer.step()
    optimizer.param_groups[0]["alpha"] = "0.9"
    with pytest.raises(TypeError, match="alpha of group 0"):
        optimizer.step()
    optimizer.param_groups[0]["alpha"] = 0.9
    optimizer.step()
    optimizer.state_dict()
