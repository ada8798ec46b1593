"""What stands between a `GradScaler` and the step: it sees plain gradients, and only real steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import triton_optim
from triton_optim import step_in_backward
from triton_optim.launch.launcher import record_launches

SCALE = 1024.0
GRADS = [[0.0, 1.0, 2.0, 3.0], [float("inf"), 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
PLAIN = [GRADS[0], GRADS[2]]

Seen = list[list[float]]


class _Wrapper:
    """Steps an optimizer that it is not, and hands on what it has not itself."""

    def __init__(self, optimizer: Any, seen: Seen) -> None:
        self.optimizer, self.seen = optimizer, seen

    def step(self) -> None:
        self.seen.append(self.optimizer.param_groups[0]["params"][0].grad.tolist())
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def _see(optimizer: Any, seen: Seen) -> None:
    seen.append(optimizer.param_groups[0]["params"][0].grad.tolist())


@contextmanager
def _wrapped(param: Parameter, seen: Seen, **kwargs: Any) -> Iterator[Any]:
    yield _Wrapper(triton_optim.SGD([param], **kwargs), seen)


def _put_another_step(optimizer: Any, seen: Seen) -> None:
    step = optimizer.step

    @functools.wraps(step)
    def another() -> None:
        _see(optimizer, seen)
        step()

    optimizer.step = another


@contextmanager
def _on_the_instance(param: Parameter, seen: Seen, **kwargs: Any) -> Iterator[Any]:
    optimizer = triton_optim.SGD([param], **kwargs)
    _put_another_step(optimizer, seen)
    yield optimizer


@contextmanager
def _around_a_schedulers(param: Parameter, seen: Seen, **kwargs: Any) -> Iterator[Any]:
    """The scheduler's own patch is harmless; what is around it, and copies its marks, is not."""
    optimizer = triton_optim.SGD([param], **kwargs)
    ExponentialLR(optimizer, 1.0)
    _put_another_step(optimizer, seen)
    yield optimizer


@contextmanager
def _of_the_class(param: Parameter, seen: Seen, **kwargs: Any) -> Iterator[Any]:
    base: Any = triton_optim.SGD

    class Another(base):  # type: ignore[misc]
        @functools.wraps(base.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            _see(self, seen)
            return super().step(*args, **kwargs)

    yield Another([param], **kwargs)


def _hook(kind: str) -> Callable[..., Any]:
    @contextmanager
    def hooked(param: Parameter, seen: Seen, **kwargs: Any) -> Iterator[Any]:
        optimizer = triton_optim.SGD([param], **kwargs)
        register: dict[str, Any] = {
            "pre": optimizer.register_step_pre_hook,
            "post": optimizer.register_step_post_hook,
            "global pre": register_optimizer_step_pre_hook,
            "global post": register_optimizer_step_post_hook,
        }
        handle = register[kind](lambda optimizer, *_: _see(optimizer, seen))
        yield optimizer
        handle.remove()

    hooked.__name__ = f"{kind} hook"
    return hooked


BETWEEN = (
    *(_wrapped, _on_the_instance, _around_a_schedulers, _of_the_class),
    *map(_hook, ("pre", "post", "global pre", "global post")),
)


def _train(optimizer: Any, param: Parameter) -> Any:
    """Steps with an overflow among them. Returns the scaler."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE, growth_interval=1000)
    for grad in GRADS:
        scale = scaler.scale(torch.ones((), device=DEVICE))
        param.grad = torch.tensor(grad, device=DEVICE) * scale
        scaler.step(optimizer)
        scaler.update()
    return scaler


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
def test_what_stands_between_sees_plain_gradients(
    between: Callable[..., Any], fused: bool | None
) -> None:
    """And is called once a step: not where the gradients overflowed."""
    seen: Seen = []
    param = Parameter(torch.ones(4, device=DEVICE))
    with between(param, seen, lr=0.1, fused=fused) as optimizer:
        scaler = _train(optimizer, param)
    assert seen == PLAIN
    assert scaler.get_scale() == SCALE / 2
    expected = torch.tensor([1.0, 0.8, 0.6, 0.4], device=DEVICE)
    torch.testing.assert_close(param.detach(), expected)


def _schedule(optimizer: Any) -> None:
    ExponentialLR(optimizer, 1.0)


def _as_accelerate_leaves_it(optimizer: Any) -> None:
    optimizer.step = optimizer.step


@pytest.mark.parametrize("name", [*triton_optim.OPTIMIZERS, "RowwiseAdagrad"])
@pytest.mark.parametrize("change", [lambda _: None, _schedule, _as_accelerate_leaves_it])
def test_fused_unscales_and_skips_in_the_kernel(name: str, change: Callable[..., None]) -> None:
    """Asked for, and with nothing between; the default leaves both to the scaler."""
    params = [Parameter(torch.ones(4, 3, device=DEVICE)) for _ in range(2)]
    gates = []
    for param, fused in zip(params, (None, True), strict=True):
        optimizer = getattr(triton_optim, name)([param], lr=0.1, fused=fused)
        change(optimizer)
        assert optimizer._step_supports_amp_scaling == bool(fused)
        with record_launches() as launches:
            scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
            scaler.scale((param * torch.arange(3.0, device=DEVICE)).sum()).backward()
            scaler.step(optimizer)
        gates.append([getattr(launch.variant, "conditions", None) for launch in launches][-1])
    assert gates == [frozenset(), {"FOUND_INF", "UNSCALE"}]
    torch.testing.assert_close(*params)


@pytest.mark.parametrize("between", BETWEEN[1:3], ids=lambda between: between.__name__)
def test_step_in_backward_refuses_a_step_on_the_instance(between: Callable[..., Any]) -> None:
    model = nn.Linear(2, 1).to(DEVICE)
    optimizer: Any = triton_optim.SGD(model.parameters())
    ExponentialLR(optimizer, 0.5)
    step_in_backward(model, optimizer).remove()
    with between(model.weight, []) as other, pytest.raises(TypeError, match="on the instance"):
        step_in_backward(model, other)


def test_a_step_put_on_the_instance_afterwards_raises() -> None:
    """At the next pass, before anything is stepped."""
    model = nn.Linear(2, 1).to(DEVICE)
    optimizer: Any = triton_optim.SGD(model.parameters())
    handle = step_in_backward(model, optimizer)
    optimizer.step = lambda: None
    before: list[Tensor] = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(TypeError, match="on the instance"):
        model(torch.ones(1, 2, device=DEVICE)).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))
    handle.remove()


class _Clamping(triton_optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            param.grad.clamp_(-1.0, 1.0)
        return super().step(closure)


def _clamp(optimizer: Any, *_: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad.clamp_(-1.0, 1.0)


@pytest.mark.parametrize("make", [_Clamping, triton_optim.SGD])
def test_what_sees_gradients_sees_them_unscaled(make: Any) -> None:
    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = make([param], lr=0.5)
    if make is not _Clamping:
        optimizer.register_step_pre_hook(_clamp)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    scaler.scale((4 * param).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(param, torch.full_like(param, 0.5))
