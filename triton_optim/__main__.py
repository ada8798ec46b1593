"""`python -m triton_optim`: what runs here, and does it agree with torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import triton_optim
from triton_optim.launch import backend
from triton_optim.testing import check

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
    ("NAdam", {}),
    ("RAdam", {}),
    ("Adadelta", {}),
    ("Rprop", {}),
    ("ASGD", {"t0": 2.0, "lambd": 0.1}),
    ("Lion", {"weight_decay": 0.01}),
]


def main() -> int:
    """Print versions, device, route and a table a rule; 1 if one is worse than torch."""
    ArgumentParser("python -m triton_optim", description=__doc__).parse_args()
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
    how = "compiled"
    if backend.DEVICE_TYPE == "cpu":
        from triton_optim.testing.interpreter import speed_up

        how = "in Triton's interpreter"
        speed_up()
    print(f"dense parameters on {backend.DEVICE_TYPE} through the kernels, {how}\n")
    failed = 0
    for name, kwargs in RULES:
        try:
            check(getattr(triton_optim, name), lr=0.01, compiled=False, **kwargs)
        except AssertionError as error:
            failed += 1
            print(f"WORSE: {error}\n")
    print(f"{len(RULES) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
