"""The training loop of the main job, in one process or in several."""

from __future__ import annotations

import argparse
import math
import os
import time
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lab.checkpoints import Parts, last_whole, load, save
from lab.language_model import Text, make_model
from lab.precisions import FLOAT32, PRECISIONS, bytes_per_param
from lab.processes import ALONE, Processes


class Spec(NamedTuple):
    """An optimizer's class in torch.optim and in triton_optim, and rates that suit the models."""

    cls: str
    kwargs: dict[str, Any]
    lr: dict[str, float]


OPTIMIZERS = {
    "sgd": Spec("SGD", {}, {"gru": 1.0, "transformer": 1.0}),
    "momentum": Spec("SGD", {"momentum": 0.9}, {"gru": 0.3, "transformer": 0.3}),
    "nag": Spec("SGD", {"momentum": 0.9, "nesterov": True}, {"gru": 0.3, "transformer": 0.3}),
    "adagrad": Spec("Adagrad", {}, {"gru": 0.03, "transformer": 0.01}),
    "rmsprop": Spec("RMSprop", {"alpha": 0.9}, {"gru": 0.004, "transformer": 0.002}),
    "adam": Spec("Adam", {}, {"gru": 0.01, "transformer": 0.002}),
    "adamw": Spec("AdamW", {}, {"gru": 0.01, "transformer": 0.002}),
    "adamax": Spec("Adamax", {}, {"gru": 0.02, "transformer": 0.005}),
    # The best of a few rates, by the loss after 350 steps of torch's class: NAdam's of 0.005, 0.01,
    # 0.02 and of 0.002, 0.005, 0.01; ASGD's of 1, 3 and of 0.3, 1, 3, where 3 gave NaN.
    "nadam": Spec("NAdam", {}, {"gru": 0.01, "transformer": 0.005}),
    "asgd": Spec("ASGD", {}, {"gru": 3.0, "transformer": 1.0}),
    "radam": Spec("RAdam", {}, {"gru": 0.02, "transformer": 0.005}),
    "adadelta": Spec("Adadelta", {}, {"gru": 3.0, "transformer": 1.0}),
    "rprop": Spec("Rprop", {}, {"gru": 0.001, "transformer": 0.001}),
    "lion": Spec("Lion", {}, {"gru": 0.001, "transformer": 0.0003}),
}
WITHOUT_TORCH = ("lion",)  # for which torch has no class
SQUARES = {"adagrad": "sum", "rmsprop": "square_avg"}  # state under the root
N_RATES = 100  # effective step sizes that a run records


def interpret() -> None:
    """Have Triton's interpreter run our kernels, before anything imports triton_optim."""
    os.environ["TRITON_INTERPRET"] = "1"
    # OpenMP's threads spin for one another: where another process holds a core, two are 100 times
    # as slow as one, which these models keep busy anyway.
    torch.set_num_threads(1)
    import_module("triton_optim.testing.interpreter").speed_up()


class Run(NamedTuple):
    """What training with one optimizer showed."""

    optimizer: str
    by: str
    losses: list[float]
    step_ms: list[float]  # of this process's own steps, not of those before a checkpoint
    measured: dict[int, float]  # by step: the effective step size, or the accuracy
    precision: str = FLOAT32
    seed: int = 0
    bytes_per_param: float | None = None

    @property
    def end(self) -> float:
        return fmean(self.losses[-max(10, len(self.losses) // 20) :])


def train(
    args: argparse.Namespace,
    text: Text,
    name: str,
    by: str,
    processes: Processes = ALONE,
    folder: Path | None = None,
) -> Run:
    """Trains to `args.steps` steps.

    Args:
        args: of train_lm.py, of one seed and precision.
        text: what to learn.
        name: of the optimizer.
        by: "triton_optim" or "torch".
        processes: those that train together; each calls this.
        folder: for the run's checkpoints. It goes on from the last one there.
    """
    torch.manual_seed(args.seed)
    model = make_model(args.model, text.vocabulary, args.size, args.context).to(args.device)
    model.to(PRECISIONS[args.precision].dtype)
    processes.shard(model)
    optimizer = make_optimizer(args, model, name, by, **PRECISIONS[args.precision].options)
    windows = text.tokens.to(args.device).unfold(0, args.context + 1, 1)
    batches = torch.Generator().manual_seed(args.seed)
    parts = Parts(model, optimizer, batches)
    run = Run(name, by, [], [], {}, args.precision, args.seed)
    if folder and (checkpoint := last_whole(folder)):
        record = load(checkpoint, parts)
        run.losses.extend(record["losses"])
        run.measured.update({int(step): rate for step, rate in record["rates"].items()})
        if processes.rank == 0:
            print(f"{name} ({by}) goes on from {checkpoint}")

    start, every = len(run.losses), max(1, args.steps // N_RATES)
    steps = range(start, args.steps)
    shown = {"total": args.steps, "initial": start, "disable": processes.rank > 0}
    how = by if args.precision == FLOAT32 else args.precision
    progress = tqdm(steps, f"{name} ({how})", unit="step", **shown)
    for step in progress:
        picks = torch.randint(len(windows), (args.batch,), generator=batches)
        batch = processes.part(windows[picks])
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        run.losses.append(processes.mean(loss))
        run.step_ms.append(timed_step(optimizer, args.device))
        if name in SQUARES and step >= args.steps // 20 and step % every == 0:
            run.measured[step] = effective_step_size(optimizer, SQUARES[name])
        if folder and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            record = {"settings": args.settings, "losses": run.losses, "rates": run.measured}
            save(folder, step + 1, parts, record)
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    return run._replace(bytes_per_param=bytes_per_param(model, optimizer))


def make_optimizer(
    args: argparse.Namespace, model: nn.Module, name: str, by: str, **options: Any
) -> torch.optim.Optimizer:
    """That of `args.lr` or the default rate, clipping to `args.max_grad_norm` if it is not None.

    options: that triton_optim has beside torch.
    """
    spec = OPTIMIZERS[name]
    kwargs = {"lr": args.lr or spec.lr[args.model], **spec.kwargs}
    # The kernels or an error, never torch's own way.
    ours = {"fused": True, "max_grad_norm": args.max_grad_norm, **options}
    optimizer = new_optimizer(by, spec.cls, model, kwargs, ours)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)

    if by == "torch" and args.max_grad_norm is not None:
        optimizer.register_step_pre_hook(clip)
    return optimizer


def new_optimizer(
    by: str, cls: str, model: nn.Module, kwargs: dict[str, Any], ours: dict[str, Any]
) -> torch.optim.Optimizer:
    """torch's class, or that of triton_optim with arguments that it has besides."""
    module, more = (torch.optim, {}) if by == "torch" else (import_module("triton_optim"), ours)
    optimizer: torch.optim.Optimizer = getattr(module, cls)(model.parameters(), **kwargs, **more)
    return optimizer


def timed_step(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Steps, and returns the milliseconds that it took."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def effective_step_size(optimizer: torch.optim.Optimizer, square: str) -> float:
    """Median over all elements of lr / (sqrt(state) + eps), of which the root is monotonic."""
    states = [state[square] for state in optimizer.state.values()]
    whole = [s.full_tensor() if isinstance(s, DTensor) else s for s in states]
    squares = torch.cat([state.flatten() for state in whole])
    group = optimizer.param_groups[0]
    lr, eps = float(group["lr"]), float(group["eps"])
    return lr / (math.sqrt(squares.median().item()) + eps)
