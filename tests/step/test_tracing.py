"""Steps while torch traces or fakes operations: torch's implementation runs, and not a kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from cases import CASES, DEVICE, Case, each, new_param, two_copies
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import triton_optim
from triton_optim.launch.launcher import record_launches

# torch's for-loop of Adagrad reads its step, which cannot be traced.
TRACED = [case for case in CASES if case.name in ("sgd", "sgd-dampening", "rmsprop", "rmsprop-all")]
every_case = each(TRACED)


def _pair(case: Case) -> tuple[list[Parameter], list[Any]]:
    """Ours and torch's, after a step."""
    params = two_copies(new_param(5))
    optimizers = [case.ours(params[:1]), case.theirs(params[1:], foreach=None)]
    for optimizer in optimizers:
        optimizer.step()
    return params, optimizers


def _traced(param: Parameter, optimizer: Any) -> Callable[[Tensor], Tensor]:
    def step(grad: Tensor) -> Tensor:
        param.grad = grad
        optimizer.step()
        return param.detach() * 1

    return step


@every_case
def test_make_fx(case: Case) -> None:
    """The graph has the update, and so has the parameter; then the kernels go on."""
    params, optimizers = _pair(case)
    grad = torch.randn(5, device=DEVICE)
    graphs = []
    with record_launches() as launches:
        for param, optimizer in zip(params, optimizers, strict=True):
            graph = make_fx(_traced(param, optimizer))(grad)
            calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
            graphs.append([c for c in calls if "profiler" not in str(c)])
    assert not launches
    assert graphs[0] == graphs[1]
    with record_launches() as launches:
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert launches
    torch.testing.assert_close(*params)


@every_case
def test_real_parameters_in_fake_mode(case: Case) -> None:
    """As with torch's: real ones are left as they are where torch leaves them."""
    params, optimizers = _pair(case)
    with record_launches() as launches, FakeTensorMode(allow_non_fake_inputs=True):
        for optimizer in optimizers:
            optimizer.step()
    assert not launches
    torch.testing.assert_close(*params)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(*params)


# torch's ASGD asks mu for its value, which a fake tensor has not.
@pytest.mark.parametrize("name", [name for name in triton_optim.OPTIMIZERS if name != "ASGD"])
def test_fake_parameters(name: str) -> None:
    with FakeTensorMode():
        param = Parameter(torch.ones(5, device=DEVICE))
        param.grad = torch.ones(5, device=DEVICE)
        optimizer = getattr(triton_optim, name)([param])
        with record_launches() as launches:
            optimizer.step()
    assert not launches


def test_fused_insists() -> None:
    param = new_param(5)
    optimizer = triton_optim.RMSprop([param], fused=True)
    optimizer.step()
    before = copy.deepcopy([param.detach(), dict(optimizer.state[param])])
    with pytest.raises(RuntimeError, match=r"`fused=True` cannot be kept .* torch traces this"):
        make_fx(_traced(param, optimizer))(torch.ones(5, device=DEVICE))
    assert_same_bits([param.detach(), dict(optimizer.state[param])], before)


def test_other_modes_do_not_matter() -> None:
    """One that only looks on, as profilers and counters of operations do."""

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    param = new_param(5)
    optimizer = triton_optim.SGD([param])
    with record_launches() as launches, Looking():  # type: ignore[no-untyped-call]
        optimizer.step()
    assert len(launches) == 1


@pytest.mark.parametrize("name", triton_optim.OPTIMIZERS)
def test_loading_in_fake_mode(name: str) -> None:
    param = new_param(5)
    optimizer = getattr(triton_optim, name)([param])
    optimizer.step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.load_state_dict(optimizer.state_dict())
