"""A checkpoint of the main job is whole, or is not taken for one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import checkpoints
from lab.checkpoints import DamagedCheckpoint, Parts, last_of_each, last_whole, load, save
from lab.processes import joined
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_state


class Killed(BaseException):
    pass


@pytest.fixture
def parts() -> Iterator[Parts]:
    """Of training in one process."""
    with joined("cpu", sharded=False):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        yield Parts(model, optimizer, torch.Generator().manual_seed(0))


def _step(parts: Parts) -> list[Any]:
    """Train, and return all that a checkpoint has to bring back."""
    parts.optimizer.zero_grad()
    parts.model(torch.rand(4, 3, generator=parts.batches)).square().sum().backward()
    parts.optimizer.step()
    states = parts.optimizer.state.values()
    tensors = [*parts.model.parameters(), *(state["momentum_buffer"] for state in states)]
    return [*(tensor.tolist() for tensor in tensors), parts.batches.get_state().tolist()]


def _killed(*_: Any, **__: Any) -> None:
    raise Killed


def _killed_after(done: Callable[..., Any]) -> Callable[..., None]:
    def save_and_die(*args: Any, **kwargs: Any) -> None:
        done(*args, **kwargs)
        raise Killed

    return save_and_die


KILLS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "before torch writes": (checkpoints, "save_state", _killed),
    "after torch wrote": (checkpoints, "save_state", _killed_after(save_state)),
    "in the record": (json, "dump", _killed),
    "before the renaming": (os, "replace", _killed),
    "before torch's index is there": (Path, "rename", _killed),
}


@pytest.mark.parametrize("when", KILLS)
def test_killed_while_saving(
    when: str, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    saved = _step(parts)
    save(run, 9, parts, {"losses": [0.1]})
    assert _step(parts) != saved
    with monkeypatch.context() as patch, pytest.raises((Killed, CheckpointException)):
        patch.setattr(*KILLS[when])
        save(run, 10, parts, {"losses": [0.1, 0.2]})
    whole = run / "step-000009"
    assert last_whole(run) == whole and last_of_each(tmp_path) == [whole]
    assert load(whole, parts) == {"losses": [0.1]}
    following = _step(parts)
    save(run, 10, parts, {"losses": [0.1, 0.2]})
    _step(parts)
    load(run / "step-000010", parts)
    assert {path.name for path in run.iterdir()} == {"step-000009", "step-000010"}
    assert last_whole(run) == run / "step-000010"
    load(whole, parts)
    assert _step(parts) == following


def test_files_are_missing(parts: Parts, tmp_path: Path) -> None:
    _step(parts)
    for step in (1, 2, 3):
        save(tmp_path, step, parts, {})
    (tmp_path / "step-000003" / ".metadata").unlink()
    checkpoint = last_whole(tmp_path)
    assert checkpoint == tmp_path / "step-000002"
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step-000002.*__0_0"):
        load(checkpoint, parts)
