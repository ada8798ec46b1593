"""Steps inside the backward pass: the bits of a normal step, and gradients freed meanwhile."""

from __future__ import annotations

import copy
import time
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, DEVICE, Case, every_state
from paired_models import MOMENTUM, Net, PairedModels
from torch import Tensor, nn

import triton_optim
from triton_optim import step_in_backward
from triton_optim.launch.launcher import record_launches
from triton_optim.launch.variant import Variant
from triton_optim.training.grad_buckets import assign_buckets


@every_state
def test_same_bits(case: Case) -> None:
    """With a scheduler, `step()` called by habit, state loaded in mid-run, and to the end of it."""
    pair = PairedModels(case)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in pair.optimizers]
    pair.step()
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    for scheduler in schedulers:
        scheduler.step()
    pair.step()
    pair.optimizers[0].step()
    for optimizer, state_dict in zip(pair.optimizers, saved, strict=True):
        optimizer.load_state_dict(state_dict)
    pair.step()
    with pair.handle:
        pair.each(lambda model, o: o.state.pop(model.head.weight, None))
        pair.step()
    pair.as_ever()


@pytest.mark.parametrize(
    "options", [{"stochastic_rounding": True}, {"master_weight_bits": 32}], ids=str
)
def test_same_bits_of_stored_formats(options: dict[str, Any]) -> None:
    """A bucket rounds by the places in the whole optimizer, and drops what was written."""
    model = Net().bfloat16()
    model.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    case = Case("stored", "SGD", {"lr": 0.1, "momentum": 0.9, **options})
    pair = PairedModels(case, model)
    pair.step(2)
    with torch.no_grad():
        pair.each(lambda model, _: model.head.weight.mul_(3))
    pair.step(blocks=2)
    pair.step()


@pytest.mark.parametrize(("bucket_bytes", "n_buckets"), [(0, 8), (200, 4), (1 << 20, 1)])
def test_a_launch_a_bucket(bucket_bytes: int, n_buckets: int) -> None:
    pair = PairedModels(MOMENTUM, bucket_bytes=bucket_bytes)
    pair.step()
    plans = [bucket._stepper.plan for bucket in pair.handle._buckets]
    first = pair.handle._buckets[0].params
    assert any(param is pair.models[0].head.bias for param in first)
    with record_launches() as launches:
        pair.models[0](torch.ones(4, 6, device=DEVICE)).sum().backward()
        pair.optimizers[0].step()
    assert len(launches) == len(plans) == n_buckets
    assert None not in plans
    assert plans == [bucket._stepper.plan for bucket in pair.handle._buckets]


def test_cut() -> None:
    """By kind, in order; one that is too large interrupts no bucket."""
    sizes = [5, 10, 60, 10, 5, 25, 5]  # float32
    params = [nn.Parameter(torch.ones(size)) for size in sizes]
    params[1].requires_grad_(False)
    params[4].data = params[4].data.half()
    places = {id(param): i for i, param in enumerate(params)}
    buckets = [[places[id(param)] for param in bucket] for bucket in assign_buckets(params, 100)]
    assert buckets == [[0, 3], [1], [2], [4], [5], [6]]


def test_live_gradients_are_bounded() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)), nn.Linear(8, 40)).to(DEVICE)
    params, bucket_bytes, peak = [*model.parameters()], 1000, 0

    def measure(_: Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(param.grad.nbytes for param in params if param.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(measure)
    step_in_backward(model, triton_optim.SGD(params), bucket_bytes=bucket_bytes)
    for bias in params[1::6]:
        bias.requires_grad_(False)  # is not waited for
    model(torch.ones(4, 8, device=DEVICE)).sum().backward()
    assert bucket_bytes < peak <= bucket_bytes + max(param.nbytes for param in params)
    assert 4 * peak < sum(param.nbytes for param in params)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_checkpoints(reentrant: bool, head: bool, launches: list[Variant]) -> None:
    """Passes of reentrant checkpoints, inside the model's, end without stepping half a bucket."""
    pair = PairedModels(MOMENTUM, bucket_bytes=1 << 20)
    pair.step(reentrant=reentrant, head=head)
    assert len(launches) == 2
    for model in pair.models:  # without what sees the model's pass, each checkpoint is a pass
        model._forward_hooks.clear()
    pair.step(reentrant=reentrant, head=head)


def test_a_gradient_that_comes_in_pieces() -> None:
    """Of a module that two reentrant checkpoints use: refused if the first was used already."""
    model: Any = Net()
    model.blocks[2] = model.blocks[1]
    pair = PairedModels(MOMENTUM, model, bucket_bytes=1 << 20)
    pair.step(reentrant=True)
    pair.handle.remove()
    step_in_backward(model, pair.optimizers[0], bucket_bytes=0)
    x = torch.ones(4, 6, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"1 \('blocks\.1\.bias'\) of group 0 .*use_reentrant=F"):
        model(x, reentrant=True).sum().backward()


def test_shared_unused_and_frozen_parameters() -> None:
    model: Any = Net()
    model.blocks[1].weight = model.blocks[0].weight
    model.blocks[0].requires_grad_(False)
    pair = PairedModels(MOMENTUM, model)
    pair.step()
    pair.each(lambda model, _: model.blocks[0].requires_grad_())
    pair.step(2)
    for blocks in (2, 3, 0):
        pair.step(blocks=blocks)
    pair.each(lambda model, _: model.head.requires_grad_(False))
    pair.step()


def test_every_backward_is_a_step() -> None:
    pair = PairedModels(MOMENTUM)
    x = torch.randn(4, 6, device=DEVICE)
    for _ in range(2):
        for model in pair.models:
            model(x).square().sum().backward()
        pair.check()
    for model in pair.models:  # through what needs no value of a parameter, the same graph twice
        loss = torch.stack([param.sum() for param in model.parameters()]).sum()
        loss.backward(retain_graph=True)
        model.loss = loss
    pair.check()
    for model in pair.models:
        model.loss.backward()
    pair.check()
    loss = pair.models[0](x).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_given_by_hand() -> None:
    """Wait for `optimizer.step()` where a pass brings none to their bucket."""
    pair = PairedModels(MOMENTUM, bucket_bytes=0)
    for model in pair.models:
        model.head.bias.grad = torch.ones_like(model.head.bias)
        model(torch.ones(4, 6, device=DEVICE), head=False).sum().backward()
    assert pair.models[0].head.bias.grad is not None
    pair.optimizers[0].step()
    pair.optimizers[0].zero_grad()
    pair.check()


@pytest.mark.parametrize("where", [0, 2])
def test_an_exception_inside_backward(where: int) -> None:
    """What waited is dropped: the next pass is the same as from here without the exception."""
    pair = PairedModels(MOMENTUM, bucket_bytes=300)
    pair.step()
    ours = pair.models[0]
    before = copy.deepcopy(ours.state_dict())

    def fail(grad: Tensor) -> None:
        raise KeyboardInterrupt

    hook = ours.blocks[where].weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        ours(torch.ones(4, 6, device=DEVICE)).sum().backward()
    hook.remove()
    end = time.monotonic() + 5  # a thread of the engine's lets go of the pass, on a GPU later
    while any(param.grad is not None for param in ours.parameters()):
        assert time.monotonic() < end
    stepped = [not torch.equal(before[name], p) for name, p in ours.named_parameters()]
    assert any(stepped) == (where == 0) and not all(stepped)
    pair.models[1].load_state_dict(ours.state_dict())
    pair.optimizers[1].load_state_dict(copy.deepcopy(pair.optimizers[0].state_dict()))
    pair.step(2)


def test_a_pass_that_the_engine_drops_late() -> None:
    """The next forward pass ends it."""
    pair = PairedModels(MOMENTUM, bucket_bytes=10**9)
    pair.step()
    stepper, ours = pair.handle, pair.models[0]
    stepper._end = weakref.ref(late := partial(stepper.remove))  # as it is until the engine lets go
    ours.head.bias.grad = torch.ones_like(ours.head.bias)
    ours(torch.ones(4, 6, device=DEVICE))
    assert stepper._end is None and ours.head.bias.grad is None
    del late
    pair.step(2)


def test_fallback_to_torch() -> None:
    """Sparse gradients of an embedding, beside dense ones."""
    case = next(case for case in CASES if case.name == "sgd-momentum")

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.embedding(x.argmax(1)))  # type: ignore[no-any-return]

    pair = PairedModels(case, Embedded().to(DEVICE))
    pair.step(3)
