"""Steps inside the backward pass: what raises, hooks, other wrappers of a model, lifetimes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assertions import assert_same_bits, raises
from cases import DEVICE
from paired_models import MOMENTUM, Net, PairedModels
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from triton_optim import SGD, step_in_backward


def _backward(model: Any) -> None:
    model(torch.ones(4, 6, device=DEVICE)).sum().backward()


class _Overriding(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def _clipping(model: nn.Module) -> SGD:
    optimizer = SGD(model.parameters())
    optimizer.max_grad_norm = 1.0
    return optimizer


def _hooked(model: nn.Module) -> SGD:
    optimizer = SGD(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: torch.optim.SGD(m.parameters()), TypeError, "use an optimizer of triton_optim"),
        (lambda m: _Overriding(m.parameters()), TypeError, "has another step"),
        (
            lambda m: SGD([*m.parameters(), nn.Parameter(torch.ones(1))]),
            RuntimeError,
            "parameter 8",
        ),
        (_clipping, RuntimeError, "leave it out"),
        (_hooked, RuntimeError, "remove it"),
    ],
)
def test_unsupported_optimizers(make: Any, error: type[Exception], message: str) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        step_in_backward(model, make(model))
    _assert_unhooked(model)


def _assert_unhooked(model: nn.Module) -> None:
    assert not model._forward_hooks
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_negative_bytes() -> None:
    model = Net()
    with pytest.raises(ValueError, match="bucket_bytes is -1"):
        step_in_backward(model, SGD(model.parameters()), bucket_bytes=-1)


def test_a_second_registration() -> None:
    """Of the optimizer, or of another one over one of its parameters."""
    model = Net()
    optimizer = SGD(model.named_parameters())
    handle = step_in_backward(model, optimizer)
    for other in (optimizer, SGD([("weight", model.head.weight)])):
        with pytest.raises(RuntimeError, match=r"weight'\).*call remove\(\)"):
            step_in_backward(model, other)
    handle.remove()
    _assert_unhooked(model)
    step_in_backward(model, optimizer)


@pytest.mark.parametrize("change", ["add", "replace", "clip", "hook"])
def test_what_is_changed_later(change: str) -> None:
    """Refused by the next pass, which drops its gradients."""
    pair = PairedModels(MOMENTUM, bucket_bytes=0)
    model, optimizer = pair.models[0], pair.optimizers[0]
    added = nn.Parameter(torch.ones(2, device=DEVICE))
    groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
    if change == "add":
        optimizer.add_param_group({"params": [("added", added)]})
    elif change == "replace":
        optimizer.param_groups[0]["params"][0] = added
    elif change == "clip":
        optimizer.max_grad_norm = 1.0
    else:
        hook = optimizer.register_step_pre_hook(lambda *_: None)
    with raises("call remove|leave it out|remove it", optimizer, [*model.parameters()]):
        _backward(model)
    assert all(param.grad is None for param in model.parameters())
    optimizer.param_groups[:] = groups
    optimizer.max_grad_norm = None
    if change == "hook":
        hook.remove()
    pair.step()


def test_errors_of_a_step_name_the_parameter() -> None:
    """Where it stands in the optimizer, not in its bucket."""
    pair = PairedModels(MOMENTUM)
    pair.step()
    model, optimizer = pair.models[0], pair.optimizers[0]
    optimizer.state[model.blocks[1].bias]["momentum_buffer"] = torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"parameter 1 \('blocks\.1\.bias'\) of group 0"):
        _backward(model)
    assert all(param.grad is None for param in model.parameters())


def test_hooks_of_the_optimizer_run_in_step() -> None:
    pair, calls = PairedModels(MOMENTUM), []
    pair.optimizers[0].register_step_post_hook(lambda *_: calls.append("post"))
    pair.step()
    assert not calls
    pair.optimizers[0].step()
    assert calls == ["post"]


@pytest.fixture
def _one_process() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_wrappers_that_exchange_gradients_later() -> None:
    model = Net()
    optimizer = SGD(model.parameters())
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel exchanges"):
        step_in_backward(wrapped, optimizer)
    _assert_unhooked(model)
    step_in_backward(model, optimizer)  # nothing tells that it is wrapped, until it is called
    with raises("DistributedDataParallel exchanges", optimizer, [*model.parameters()]):
        _backward(wrapped)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("root", [True, False])
def test_fully_shard(root: bool) -> None:
    """It runs the hooks of a shard itself, the last of them at the end of the pass."""
    models: list[Any] = [Net()]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        for module in (*model.blocks, model if root else model.head):
            fully_shard(module)
    optimizers = [MOMENTUM.ours(model.parameters()) for model in models]
    buckets = step_in_backward(models[0], optimizers[0], bucket_bytes=200)._buckets
    plans = []
    for _ in range(3):
        for model in models:
            _backward(model)
        assert all(param.grad is None for param in models[0].parameters())
        optimizers[1].step()
        optimizers[1].zero_grad()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p.full_tensor(), q.full_tensor())
        plans.append([bucket._stepper.plan for bucket in buckets])
    assert plans[1] == plans[2]


def test_a_compiled_model() -> None:
    model = Net()
    step_in_backward(model, SGD(model.parameters(), lr=0.5), bucket_bytes=200)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = model.head.bias.detach().clone()
    _backward(compiled)
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(model.head.bias, before - 2)


def test_a_copy_of_the_model_is_not_stepped() -> None:
    model = Net()
    step_in_backward(model, SGD(model.parameters()))
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _backward(duplicate)
        assert all(param.grad is not None for param in duplicate.parameters())
        assert_same_bits([*duplicate.parameters()], [*model.parameters()])


def test_lifetimes() -> None:
    """The model keeps everything, and nothing keeps the model."""
    model = Net()
    optimizer = SGD(model.parameters(), momentum=0.9)
    seen: list[Any] = [optimizer, step_in_backward(model, optimizer), *model.blocks.parameters()]
    seen = [*map(weakref.ref, seen)]
    del optimizer
    gc.collect()
    before = model.head.bias.detach().clone()
    _backward(model)
    assert not torch.equal(model.head.bias, before)
    head: Any = model.head
    del model
    gc.collect()
    assert all(ref() is None for ref in seen)
    with pytest.raises(RuntimeError, match="is gone"):
        head(torch.ones(4, 6, device=DEVICE)).sum().backward()
