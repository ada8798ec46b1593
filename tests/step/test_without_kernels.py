"""On a CPU without Triton's interpreter, and without Triton: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
_AS_TORCH = """
import sys, warnings
import torch, triton_optim
from triton_optim.launch import backend
assert str(backend.DEVICE_TYPE) == sys.argv[2], backend.DEVICE_TYPE
name, fused = sys.argv[1], {"True": True, "None": None}[sys.argv[3]]
params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
another = torch.nn.Parameter(torch.ones(3))
another.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ours = getattr(triton_optim, name)([params[0], another], lr=0.1, fused=fused)
    theirs = getattr(torch.optim, name)([params[1]], lr=0.1)
    for _ in range(3):
        for param, optimizer in zip(params, (ours, theirs)):
            param.grad = torch.full((5,), 0.5)
            optimizer.step()
# once, and where this program made the step
assert [warning.filename for warning in caught] == ["<string>"] * bool(fused), caught
assert all("parameter 0 of group 0 and 1 more: " in str(warning.message) for warning in caught)
assert torch.equal(*params)
# torch's fused CPU SGD garbles a gradient that is strided unlike its parameter
weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
ours.add_param_group({"params": weights[:1]})
# before 2.12 torch's Adagrad makes no state for a group that is added
for weight, optimizer in zip(weights, (ours, type(theirs)(weights[1:], lr=0.1))):
    weight.grad = torch.arange(6.0).view(3, 2).t()
    optimizer.step()
assert torch.equal(*weights)
"""


def _run(program: str, *arguments: str) -> str:
    """What it prints on the CPU, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(
        command, env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("fused", ["None", "True"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop"])
def test_cpu_without_the_interpreter_falls_back(name: str, fused: str) -> None:
    _run(_AS_TORCH, name, "cuda", fused)


def test_without_triton_all_falls_back() -> None:
    _run(WITHOUT_TRITON + _AS_TORCH, "RMSprop", "None", "None")


def test_row_wise_adagrad_without_triton() -> None:
    script = """
import torch, triton_optim
param = torch.nn.Parameter(torch.ones(2, 2))
param.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
triton_optim.RowwiseAdagrad([param], lr=12.5 ** 0.5, eps=0).step()
assert param[0].tolist() == [-2.0, -3.0], param
"""
    _run(WITHOUT_TRITON + script)


def test_lazy_rmsprop_without_kernels_raises() -> None:
    program = """
import torch, triton_optim
param = torch.nn.Parameter(torch.ones(3, 2))
optimizer = triton_optim.RMSprop([param], sparse="lazy")
param.grad = torch.ones(3, 2)
optimizer.step()
param.grad = torch.ones(3, 2).to_sparse(1)
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
"""
    assert _run(program).startswith(
        "sparse='lazy' cannot take parameter 0 of group 0: it is on cpu, where the kernels do not "
        "run; use the kernels, which run on a GPU and under TRITON_INTERPRET=1, or go on from"
    )
