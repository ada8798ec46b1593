"""Profiles one training step: forward, backward and the optimizer's step, with their kernels.

    python perf/profile_step.py

Writes a Chrome trace (open it in https://ui.perfetto.dev), prints the time of every phase, and the
update kernels' share. On a GPU the phases are NVTX ranges too, for `nsys profile`, and

    proton --hook triton perf/profile_step.py && proton-viewer -m gbyte/s,time/us proton.hatchet

shows the update kernel's GB/s, for it declares its bytes to Triton's profiler. Without a GPU the
kernels run in Triton's interpreter: that shows how a trace reads, not how long a step takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lab.language_model import make_model
from lab.training import OPTIMIZERS, interpret, make_optimizer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

VOCABULARY = 256
BATCH = 16
WARMUP = 3  # steps; the first compiles the kernels
PHASES = ("forward", "backward", "optimizer")
UPDATE_KERNEL = "multi_tensor_kernel"


@contextmanager
def phase(name: str, device: str) -> Iterator[None]:
    """A range in the trace and, on a GPU, for NVTX."""
    nvtx: Any = torch.cuda.nvtx.range(name) if device == "cuda" else nullcontext()
    with record_function(name), nvtx:
        yield


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, device: str
) -> None:
    optimizer.zero_grad()
    with phase("forward", device):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    with phase("backward", device):
        loss.backward()
    with phase("optimizer", device):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def report(profiler: profile, device: str) -> None:
    """The phases on the host, and on a GPU the kernels' share of the device's time."""
    averages = profiler.key_averages()
    host = {event.key: event for event in averages if event.device_type.name == "CPU"}
    total = sum(host[name].cpu_time_total for name in PHASES)
    print(f"{'phase':<12}{'host ms':>10}{'share':>8}")
    for name in PHASES:
        time = host[name].cpu_time_total
        print(f"{name:<12}{time / 1e3:>10.3f}{time / total:>8.1%}")
    if device == "cpu":
        print("\nThe update kernel ran in Triton's interpreter: its time says nothing of a GPU's.")
        return
    on_gpu = (event for event in averages if event.device_type.name == "CUDA")
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    updates = [event for event in kernels if UPDATE_KERNEL in event.key]
    busy, update = (sum(e.self_device_time_total for e in found) for found in (kernels, updates))
    count = sum(event.count for event in updates)
    print(f"\nThe device was busy for {busy / 1e3:.3f} ms, and {update / 1e3:.3f} ms of it,")
    print(f"{update / busy:.1%}, in {count} launches of the update kernel.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="rmsprop")
    parser.add_argument("--by", choices=["triton_optim", "torch"], default="triton_optim")
    parser.add_argument("--model", choices=["gru", "transformer"], default="transformer")
    parser.add_argument("--size", type=int, default=128, help="width of the model")
    parser.add_argument("--context", type=int, default=64, help="tokens")
    parser.add_argument("--trace", type=Path, default=Path("profile_step.json"))
    args = parser.parse_args()
    args.lr = args.max_grad_norm = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        interpret()
    torch.manual_seed(0)
    model = make_model(args.model, VOCABULARY, args.size, args.context).to(device)
    optimizer = make_optimizer(args, model, args.optimizer, args.by)
    tokens = torch.randint(VOCABULARY, (BATCH, args.context + 1), device=device)
    for _ in range(WARMUP):
        train_step(model, optimizer, tokens, device)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        train_step(model, optimizer, tokens, device)
    report(profiler, device)
    profiler.export_chrome_trace(str(args.trace))
    print(f"wrote {args.trace}")


if __name__ == "__main__":
    main()
