"""The options of the main job: what they are, and which do not go together."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch

from lab.checkpoints import last_of_each, read, step_of
from lab.language_model import HEADS, Text, documentation
from lab.precisions import FLOAT32, PRECISIONS
from lab.training import OPTIMIZERS, WITHOUT_TORCH

CHECKPOINTS = Path("train_lm_checkpoints")  # default with --shard
MAX_GRAD_NORM = 1.0  # default with --shard
# A checkpoint's settings are defaults of the run that resumes from it; those of FIXED must stay.
FIXED = ("model", "size", "batch", "context", "seed", "lr", "max_grad_norm")
SETTINGS = ("optimizer", "steps", "save_every", "text", *FIXED)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_number(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return number


def _parser(description: str) -> argparse.ArgumentParser:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--optimizer", nargs="+", choices=OPTIMIZERS, default=["rmsprop", "adagrad"])
    add("--model", choices=["gru", "transformer"], default="gru")
    add("--text", type=Path, help="default: Python's own documentation")
    add("--size", type=positive, default=128, help="width of the model")
    add("--steps", type=positive, default=350)
    add("--batch", type=positive, default=16, help="of all processes together")
    add("--context", type=positive, default=64, help="bytes")
    add("--seed", type=int, default=0)
    add("--seeds", type=positive, default=1, help="how many, from --seed on, with --precision")
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=[FLOAT32],
        dest="precisions",
        help="train in each, and in float32, and compare",
    )
    add("--csv", type=Path, help="write the losses of --precision there")
    add("--lr", type=positive_number, help="default: one that suits optimizer and model")
    add(
        "--max-grad-norm",
        type=positive_number,
        help=f"of all gradients together; default: {MAX_GRAD_NORM:g} with --shard, else no limit",
    )
    add("--device", choices=["cpu", "cuda"], default=device)
    add(
        "--against",
        choices=["torch", "single", "nothing"],
        help="run torch.optim's beside it, or a single process (default with --shard)",
    )
    add("--plot", type=Path, default=Path("train_lm.png"), help="a PNG")
    add("--shard", action="store_true", help="train under fully_shard, in torchrun's processes")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help=f"save there, in a folder for each run; default: {CHECKPOINTS} with --shard",
    )
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on from the last checkpoints there, with their settings, and save there",
    )
    add("--save-every", type=positive, default=100, metavar="STEPS", help="and at the end")
    return parser


def arguments(description: str) -> tuple[argparse.Namespace, Text]:
    """What was asked for, checked, and the text to learn.

    Beside the options: `folder`, where checkpoints go, or None; `settings`, what they say of a run;
    `compares`, whether precisions are compared; `precision`, that of a run.
    """
    parser = _parser(description)
    args = parser.parse_args()
    settings: dict[str, Any] = {}
    if args.resume:
        if not (whole := last_of_each(args.resume)):
            parser.error(f"--resume {args.resume}: no whole checkpoint of this script is there")
        settings = read(whole[0])["settings"]
        parser.set_defaults(**{name: settings[name] for name in SETTINGS})
        args = parser.parse_args()
    elif args.shard:
        args.checkpoint = args.checkpoint or CHECKPOINTS
        args.max_grad_norm = args.max_grad_norm or MAX_GRAD_NORM
    args.folder = args.resume or args.checkpoint
    args.against = args.against or ("single" if args.shard else "nothing")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.lr is not None and not math.isfinite(args.lr):
        parser.error(f"--lr {args.lr}: must be finite")
    if args.against == "torch" and (missing := {*args.optimizer} & {*WITHOUT_TORCH}):
        parser.error(f"--against torch: torch has no {', '.join(missing)}")
    if args.model == "transformer" and args.size % HEADS:
        parser.error(f"--size {args.size}: a transformer needs a multiple of {HEADS}")
    if args.plot.is_dir() or not args.plot.parent.is_dir():
        parser.error(f"--plot {args.plot}: not a file in an existing folder")
    _check_processes(parser, args)
    _check_precisions(parser, args)
    try:
        content = args.text.read_bytes() if args.text else documentation()
    except OSError as error:
        parser.error(f"--text {args.text}: {error.strerror}")
    if len(content) <= args.context or len(set(content)) < 2:
        parser.error(f"the text needs more than {args.context} bytes, not all the same")
    args.settings = {name: getattr(args, name) for name in SETTINGS}
    args.settings["text"] = args.text and str(args.text.absolute())
    args.settings["text_sha256"] = hashlib.sha256(content).hexdigest()
    _check_checkpoints(parser, args, settings)
    return args, Text.of(content)


def _check_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not args.shard:
        parser.error(f"{processes} processes: they train together with --shard")
    if args.batch % processes:
        parser.error(f"--batch {args.batch}: {processes} processes cannot share it out evenly")
    if args.against == "single" and not args.shard:
        parser.error("--against single: needs --shard")
    gpus = torch.cuda.device_count()
    if args.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        parser.error(f"--device cuda: each process needs a GPU, and torch sees {gpus}")


def _check_precisions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.compares = args.precisions != [FLOAT32]
    args.precisions = [FLOAT32, *(name for name in args.precisions if name != FLOAT32)]
    args.precision = FLOAT32
    if args.compares and (args.folder or args.against != "nothing"):
        parser.error("--precision: without --shard, --checkpoint, --resume and --against")
    if not args.compares and (args.seeds > 1 or args.csv):
        parser.error("--seeds and --csv: with a --precision beside float32")


def _check_checkpoints(
    parser: argparse.ArgumentParser, args: argparse.Namespace, settings: dict[str, Any]
) -> None:
    if not args.folder:
        return
    if args.folder.exists() and not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    whole = last_of_each(args.folder)
    if not args.resume:
        if whole:
            parser.error(
                f"{whole[0]} is there already: --resume {args.folder} goes on from it, and "
                "--checkpoint with another folder begins anew"
            )
        return
    for name in FIXED:
        now, then = args.settings[name], settings[name]
        if now != then:
            option = "--" + name.replace("_", "-")
            then = "the default" if then is None else then
            parser.error(f"{option} {now}: the checkpoints of {args.resume} have {then}")
    if args.settings["text_sha256"] != settings["text_sha256"]:
        parser.error(f"--text: not the bytes that the checkpoints of {args.resume} were trained on")
    for checkpoint in whole:
        if step_of(checkpoint) > args.steps:
            parser.error(f"--steps {args.steps}: {checkpoint} is further on")
