"""Checkpoints by torch.distributed.checkpoint, each written whole or not at all.

`FOLDER/step-000100` has torch's files and `run.json`. It is `step-000100.unfinished` until all
processes have written their parts. Processes share the file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

RECORD = "run.json"
WHOLE = (".metadata", RECORD)  # torch's index of its files, which it writes last, and ours


class DamagedCheckpoint(Exception):
    pass


class Parts(NamedTuple):
    """What training goes on from."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: torch.Generator

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "batches": self.batches.get_state()}


def last_whole(folder: Path) -> Path | None:
    """The checkpoint after most steps."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    whole = [path for path in paths if all((path / name).exists() for name in WHOLE)]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def last_of_each(folder: Path) -> list[Path]:
    """The last whole checkpoint of each run that has its folder there."""
    found = (last_whole(run) for run in sorted(folder.glob("*")))
    return [checkpoint for checkpoint in found if checkpoint]


def save(folder: Path, step: int, parts: Parts, record: dict[str, Any]) -> None:
    """All processes call it; the first one's `record`, for JSON, is what `load` returns."""
    whole = folder / f"step-{step:06}"
    unfinished = whole.with_suffix(".unfinished")
    first = dist.get_rank() == 0
    if first:
        for left_over in (unfinished, whole):
            shutil.rmtree(left_over, ignore_errors=True)
    # Returns when all have written. None writes before the first one has planned it.
    save_state(parts.state(), checkpoint_id=unfinished)
    if first:
        with (unfinished / RECORD).open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, whole)


def read(checkpoint: Path) -> dict[str, Any]:
    """The record that was saved with it."""
    record: dict[str, Any] = json.loads((checkpoint / RECORD).read_text())
    return record


def load(checkpoint: Path, parts: Parts) -> dict[str, Any]:
    """Fills the parts, sharded in any way, and returns the record.

    Raises:
        DamagedCheckpoint: torch cannot read its files.
    """
    state = parts.state()
    try:
        load_state(state, checkpoint_id=checkpoint)
    except CheckpointException as error:
        causes = ", ".join(str(cause) for cause, _ in error.failures.values())
        raise DamagedCheckpoint(f"{checkpoint}: {causes}") from error
    set_state_dict(
        parts.model,
        parts.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    parts.batches.set_state(state["batches"])
    return read(checkpoint)
