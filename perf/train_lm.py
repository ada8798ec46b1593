"""Trains a byte-level language model on real text; with no GPU, in Triton's interpreter.

Shows that the optimizers train, that `--against torch` follows the same curve, and that Adagrad's
effective step size keeps decaying where RMSprop's follows the size of recent gradients: it drifts
down with the default GRU, much less than Adagrad's, and is near level with the transformer.

    python perf/train_lm.py
    python perf/train_lm.py --optimizer sgd momentum nag adagrad rmsprop --against torch

In two processes under torch's fully_shard, beside the same training in one, and on from the last
checkpoint in any number of processes:

    torchrun --nproc-per-node 2 perf/train_lm.py --shard
    python perf/train_lm.py --resume train_lm_checkpoints

In bfloat16, rounded to nearest, stochastically, or with exact float32 weights, beside float32:

    python perf/train_lm.py --precision bfloat16 stochastic exact --seeds 3
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace

from lab import compared, machine
from lab.checkpoints import DamagedCheckpoint, last_of_each
from lab.curves import ONE_PROCESS, plot, report
from lab.language_model import Text
from lab.options import arguments
from lab.processes import ALONE, Processes, ends_with_a_message, joined, leave
from lab.training import Run, interpret, train


def main() -> None:
    args, text = arguments((__doc__ or "").partition("\n")[0])
    first = os.environ.get("RANK", "0") == "0"
    if args.device == "cpu":
        interpret()
        if first:
            print("On the CPU the very same kernels run in Triton's interpreter.")
    if first:
        print(f"{len(text.tokens)} bytes, unigram entropy {text.entropy:.3f} nats per byte")
    if args.compares:
        compare(args, text)
        return
    runs = train_together(args, text) if args.folder else train_all(args, text, ALONE)
    if not first:
        leave()
    if args.against == "single":
        runs += [
            train(args, text, name, "triton_optim")._replace(by=ONE_PROCESS)
            for name in args.optimizer
        ]
        runs.sort(key=lambda run: args.optimizer.index(run.optimizer))
    report(runs)
    loss = {"title": "Loss", "ylabel": "nats per byte"}
    rate = "Effective step size: median of lr / (√state + eps)"
    plot(runs, args.plot, loss, {"title": rate, "yscale": "log"}, entropy=text.entropy)
    print(f"wrote {args.plot}")
    if failed := [run for run in runs if not run.end < text.entropy]:
        names = ", ".join(f"{run.optimizer} ({run.by})" for run in failed)
        sys.exit(f"no better at the end than the unigram entropy: {names}")


def compare(args: argparse.Namespace, text: Text) -> None:
    """Trains in each precision from each seed."""
    runs = [
        train(
            Namespace(**{**vars(args), "precision": precision, "seed": seed}),
            text,
            name,
            "triton_optim",
        )
        for name in args.optimizer
        for precision in args.precisions
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    groups = compared.of(runs)
    compared.report(groups)
    compared.plot(groups, args.plot)
    print(f"wrote {args.plot}")
    if args.csv:
        compared.write(groups, args.csv, {"machine": machine.in_one_line()})
        print(f"wrote {args.csv}")


def train_together(args: argparse.Namespace, text: Text) -> list[Run]:
    """Trains by checkpoints, in all processes of torchrun or in this one."""

    def remedy() -> str:
        whole = " and ".join(map(str, last_of_each(args.folder)))
        return f"--resume {args.folder} goes on from {whole}" if whole else "It had not saved yet"

    try:
        with ends_with_a_message(remedy), joined(args.device, sharded=args.shard) as processes:
            if processes.rank == 0:
                print(f"processes: {processes.size}, checkpoints in {args.folder}")
            return train_all(args, text, processes)
    except DamagedCheckpoint as error:
        sys.exit(f"{error}; without this folder, --resume goes on from the checkpoint before it")


def train_all(args: argparse.Namespace, text: Text, processes: Processes) -> list[Run]:
    implementations = ["triton_optim", *(["torch"] if args.against == "torch" else [])]
    return [
        train(args, text, name, by, processes, args.folder and args.folder / f"{name}-{by}")
        for name in args.optimizer
        for by in implementations
    ]


if __name__ == "__main__":
    main()
