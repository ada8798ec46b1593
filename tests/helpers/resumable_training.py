"""What test_resume.py kills: training that saves a checkpoint after every step."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.nn import Linear, Sequential, Tanh
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import triton_optim

RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
]


def train(path: Path, steps: int, report: Connection) -> None:
    """Train from the checkpoint at `path`, or from the start, until `steps` steps were made.

    Each layer has an optimizer and a schedule of its own.

    Args:
        path: replaced after every step.
        steps: counted from the very start, not from the checkpoint.
        report: is sent (steps made, what comes next), before it comes.
    """
    report.send((0, "load"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [Linear(8, 32), Linear(32, 16), Linear(16, 4)]
    model = Sequential(layers[0], Tanh(), layers[1], Tanh(), layers[2])
    parts: dict[str, Any] = {"model": model}
    for layer, (name, kwargs) in zip(layers, RULES, strict=True):
        optimizer = getattr(triton_optim, name)(layer.parameters(), fused=True, **kwargs)
        parts[name] = optimizer
        parts[f"{name}'s schedule"] = CosineAnnealingWarmRestarts(optimizer, T_0=7)
    step = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        step = checkpoint["step"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    while step < steps:
        report.send((step, "train"))
        data = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        mse_loss(model(data[:, :8]), data[:, 8:]).backward()
        for name, part in parts.items():
            if name != "model":
                part.step()
        step += 1
        report.send((step, "save"))
        save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, path)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a process killed meanwhile leaves the one before, whole."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
