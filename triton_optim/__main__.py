"""`python -m triton_optim`: what runs here, and does it agree with torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import torch
from torch import Tensor

import triton_optim
from triton_optim.launch import backend
from triton_optim.launch.launcher import UpdateLaunch, record_launches

# class, keyword arguments beside lr
RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.01}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.01}),
    ("AdamW", {}),
    ("Adamax", {}),
    ("RAdam", {}),
    ("Adadelta", {}),
    ("Rprop", {}),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMELS = (1, 1000, 4096, 5000)
STEPS = 5


def main() -> int:
    """Print versions, device, ways and a row a rule and dtype; 1 if one is worse than torch."""
    print(f"triton_optim {triton_optim.__version__}, torch {torch.__version__}, ", end="")
    print(f"Triton {_version('triton')}, Python {platform.python_version()}")
    if torch.cuda.is_available():
        print(f"device: {torch.cuda.get_device_name()}")
    else:
        print(f"device: CPU ({platform.machine()}), no GPU")
    if backend.DEVICE_TYPE is None:
        print("torch's implementation steps every parameter, because Triton is not installed")
        return 0
    if backend.DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        print(
            "torch's implementation steps every parameter; with TRITON_INTERPRET=1 the kernels do,"
        )
        print("which are checked so below:\n", flush=True)
        command = [sys.executable, "-m", "triton_optim"]
        return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})
    how = "compiled" if backend.DEVICE_TYPE == "cuda" else "in Triton's interpreter"
    print(f"dense parameters on {backend.DEVICE_TYPE} through the kernels, {how}\n")

    print(f"largest error of {sum(NUMELS)} elements after {STEPS} steps, against torch's for-loop")
    print("in float64:\n")
    header = ("optimizer", "dtype", "triton_optim", "torch", "launches/step", "bytes/param", "")
    rows = [_row(name, kwargs, dtype) for (name, kwargs), dtype in product(RULES, DTYPES)]
    for row in [header, *rows]:
        print("{:<52}{:<9}{:>13}{:>11}{:>15}{:>13}  {}".format(*row).rstrip())
    worse = sum(row[-1] == "WORSE" for row in rows)
    print(f"\n{len(rows) - worse} passed, {worse} failed")
    return 1 if worse else 0


def _row(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    with record_launches() as launches:
        ours = _train(getattr(triton_optim, name), dtype, dtype, kwargs)
    update = launches[-1]
    assert isinstance(update, UpdateLaunch)
    torch_class = getattr(torch.optim, name)
    theirs = _train(torch_class, dtype, dtype, {**kwargs, "foreach": False})
    exact = _train(torch_class, dtype, torch.float64, {**kwargs, "foreach": False})
    error, torch_error = _error(ours, exact), _error(theirs, exact)
    # The two may round a value to either side: a unit in the last place. In float64 torch itself is
    # the reference, and each step may add one.
    units = STEPS if dtype == torch.float64 else 1
    slack = units * torch.finfo(dtype).eps * float(max(p.abs().max() for p in exact))
    label = f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})"
    return (
        label,
        str(dtype).removeprefix("torch."),
        f"{error:.2e}",
        f"{torch_error:.2e}",
        f"{len(launches) / STEPS:g}",
        f"{update.variant.bytes_per_element}",
        "ok" if error <= torch_error + slack else "WORSE",
    )


def _train(
    optimizer_class: Any, storage: torch.dtype, dtype: torch.dtype, kwargs: dict[str, Any]
) -> list[Tensor]:
    """Parameters after STEPS steps in `dtype`, from values that `storage` holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(numel: int) -> Tensor:
        values = torch.randn(numel, generator=generator).to(storage).to(dtype)
        return values.to(str(backend.DEVICE_TYPE))

    params = [torch.nn.Parameter(draw(numel)) for numel in NUMELS]
    optimizer = optimizer_class(params, lr=0.01, **kwargs)
    for _ in range(STEPS):
        for param in params:
            param.grad = draw(param.numel())
        optimizer.step()
    return [param.detach().double() for param in params]


def _error(params: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((p - e).abs().max()) for p, e in zip(params, exact, strict=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
