"""Trains a byte-level language model on real text; with no GPU, in Triton's interpreter.

Shows that the optimizers train, that `--against torch` follows the same curve, and that Adagrad's
effective step size keeps decaying where RMSprop's follows the size of recent gradients: it drifts
down with the default GRU, much less than Adagrad's, and is near level with the transformer.

    python perf/train_lm.py
    python perf/train_lm.py --optimizer sgd momentum nag adagrad rmsprop --against torch
"""

from __future__ import annotations

import argparse
import math
import sys
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lab import training
from lab.training import positive, timed_step
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm


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
}
SQUARES = {"adagrad": "sum", "rmsprop": "square_avg"}  # state under the root
HEADS = 4
LAYERS = 2
N_RATES = 100  # effective step sizes that a run records


class GRU(nn.Module):
    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.gru = nn.GRU(size, size, bias=False, batch_first=True)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size, bias=False) for _ in range(2))
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(size, 4 * size, bias=False), nn.GELU(), nn.Linear(4 * size, size, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        output: Tensor = x + self.mlp(self.norms[1](x))
        return output


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, size: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.position = nn.Embedding(context, size)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(size, bias=False)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Text(NamedTuple):
    """A text as indices into the bytes that occur in it."""

    tokens: Tensor
    vocabulary: int
    entropy: float  # of a byte by its frequency alone, in nats

    @classmethod
    def of(cls, content: bytes) -> Text:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        occurring, tokens, counts = data.unique(return_inverse=True, return_counts=True)
        frequency = counts.double() / len(data)
        return cls(tokens, len(occurring), -(frequency * frequency.log()).sum().item())


class Run(NamedTuple):
    """What training with one optimizer showed."""

    optimizer: str
    implementation: str
    losses: list[float]
    step_ms: list[float]
    rates: dict[int, float]  # effective step size by step

    @property
    def end(self) -> float:
        return fmean(self.losses[-max(10, len(self.losses) // 20) :])


def train(args: argparse.Namespace, text: Text, name: str, implementation: str) -> Run:
    torch.manual_seed(args.seed)
    model = make_model(args, text.vocabulary).to(args.device)
    optimizer = make_optimizer(args, model, name, implementation)

    windows = text.tokens.to(args.device).unfold(0, args.context + 1, 1)
    batches = torch.Generator().manual_seed(args.seed)
    run = Run(name, implementation, [], [], {})
    every = max(1, args.steps // N_RATES)
    progress = tqdm(range(args.steps), f"{name} ({implementation})", unit="step")
    for step in progress:
        batch = windows[torch.randint(len(windows), (args.batch,), generator=batches)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        run.losses.append(loss.item())
        run.step_ms.append(timed_step(optimizer, args.device))
        if name in SQUARES and step >= args.steps // 20 and step % every == 0:
            run.rates[step] = effective_step_size(optimizer, SQUARES[name])
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    return run


def make_model(args: argparse.Namespace, vocabulary: int) -> nn.Module:
    if args.model == "gru":
        return GRU(vocabulary, args.size)
    return Transformer(vocabulary, args.size, args.context)


def make_optimizer(
    args: argparse.Namespace, model: nn.Module, name: str, implementation: str
) -> torch.optim.Optimizer:
    spec = OPTIMIZERS[name]
    kwargs = {"lr": args.lr or spec.lr[args.model], **spec.kwargs}
    if implementation == "torch":
        module = torch.optim
    else:
        module = import_module("triton_optim")
        kwargs["fused"] = True  # the kernels or an error, never torch's own way
    optimizer: torch.optim.Optimizer = getattr(module, spec.cls)(model.parameters(), **kwargs)
    return optimizer


def effective_step_size(optimizer: torch.optim.Optimizer, square: str) -> float:
    """Median over all elements of lr / (sqrt(state) + eps), of which the root is monotonic."""
    squares = torch.cat([state[square].flatten() for state in optimizer.state.values()])
    group = optimizer.param_groups[0]
    lr, eps = float(group["lr"]), float(group["eps"])
    return lr / (math.sqrt(squares.median().item()) + eps)


def report(runs: list[Run]) -> None:
    """Prints a row a run; where torch's run follows ours, how far apart the two ever were."""
    print(f"{'optimizer':<10} {'by':<12} {'start':>7} {'end':>7} {'ms/step':>9} {'max |diff|':>11}")
    ours: dict[str, Run] = {}
    for run in runs:
        other = ours.setdefault(run.optimizer, run)
        pairs = zip(run.losses, other.losses, strict=True)
        difference = "" if other is run else f"{max(abs(a - b) for a, b in pairs):11.1e}"
        print(
            f"{run.optimizer:<10} {run.implementation:<12} {run.losses[0]:7.3f} {run.end:7.3f} "
            f"{median(run.step_ms):9.3f} {difference}"
        )


def plot(runs: list[Run], entropy: float, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        reference = "torch.optim" if run.implementation == "torch" else None
        style = training.style([*OPTIMIZERS].index(run.optimizer), run.optimizer, reference)
        left.plot(run.losses, **style)
        if run.rates:
            right.plot(list(run.rates), list(run.rates.values()), **style)
    left.axhline(entropy, color="gray", linestyle="--", label="unigram entropy")
    left.set(title="Loss", ylabel="nats per byte")
    right.set(title="Effective step size: median of lr / (√state + eps)", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    training.save(figure, path)


def arguments() -> tuple[argparse.Namespace, Text]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, default=["rmsprop", "adagrad"]
    )
    parser.add_argument("--model", choices=["gru", "transformer"], default="gru")
    parser.add_argument("--text", type=Path, help="default: Python's own documentation")
    training.add_options(parser, size=128, steps=350, batch=16, plot="train_lm.png")
    parser.add_argument("--context", type=positive, default=64, help="bytes")
    parser.add_argument("--lr", type=float, help="default: one that suits optimizer and model")
    parser.add_argument("--against", choices=["torch"], help="run torch.optim's beside it")
    args = training.parse(parser)
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr}: must be positive and finite")
    if args.model == "transformer" and args.size % HEADS:
        parser.error(f"--size {args.size}: a transformer needs a multiple of {HEADS}")
    try:
        content = args.text.read_bytes() if args.text else documentation()
    except OSError as error:
        parser.error(f"--text {args.text}: {error.strerror}")
    if len(content) <= args.context or len(set(content)) < 2:
        parser.error(f"the text needs more than {args.context} bytes, not all the same")
    return args, Text.of(content)


def documentation() -> bytes:
    return "".join(topics[name] for name in sorted(topics)).encode()


def main() -> None:
    args, text = arguments()
    training.prepare(args.device)
    print(f"{len(text.tokens)} bytes, unigram entropy {text.entropy:.3f} nats per byte")
    implementations = ["triton_optim", *([args.against] if args.against else [])]
    runs = [train(args, text, name, by) for name in args.optimizer for by in implementations]
    report(runs)
    plot(runs, text.entropy, args.plot)
    if failed := [run for run in runs if not run.end < text.entropy]:
        names = ", ".join(f"{run.optimizer} ({run.implementation})" for run in failed)
        sys.exit(f"no better at the end than the unigram entropy: {names}")


if __name__ == "__main__":
    main()
