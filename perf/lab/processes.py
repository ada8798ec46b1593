"""The processes that train one model together, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from lab.language_model import Block

TIMEOUT = timedelta(seconds=60)  # of a process that waits for another
UNITS = (nn.GRU, Block)  # modules whose parameters are gathered together


class Processes(NamedTuple):
    """What one of them knows of all."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # over which models are sharded

    def shard(self, model: nn.Module) -> None:
        """Leaves each process a part of every parameter."""
        if self.mesh:
            for module in model.modules():
                if isinstance(module, UNITS):
                    fully_shard(module, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)

    def part(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, loss: Tensor) -> float:
        """Over all processes, whose parts of a batch are equally large."""
        loss = loss.detach()
        if self.size > 1:
            dist.all_reduce(loss)
        return loss.item() / self.size


ALONE = Processes()


@contextmanager
def joined(device: str, *, sharded: bool) -> Iterator[Processes]:
    """The processes of torchrun or, without it, this one alone."""
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    size = dist.get_world_size()
    mesh = init_device_mesh(device, (size,)) if sharded else None
    yield Processes(dist.get_rank(), size, mesh)
    dist.destroy_process_group()


def leave() -> NoReturn:
    """End this process now: Gloo's threads may hold tensors yet, which abort where Python ends.

    See https://github.com/pytorch/pytorch/pull/179291.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def ends_with_a_message(remedy: Callable[[], str]) -> Iterator[None]:
    """Where another process is lost, or SIGTERM comes, print one line and exit with 1.

    Args:
        remedy: how to go on, for the end of that line.
    """

    def end(reason: str) -> NoReturn:
        rank = os.environ.get("RANK", "0")
        print(f"\nrank {rank} stopped: {reason}. {remedy()}", file=sys.stderr, flush=True)
        os._exit(1)  # leaving the group could wait for the process that is lost

    def wait_for_sigterm() -> None:
        while received := os.read(signals, 1):
            if received[0] == signal.SIGTERM:
                end("SIGTERM came, which torchrun sends when another process is lost")

    # A handler in Python would wait for the main thread, which may wait for a GPU.
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGTERM, lambda *_: None)
    thread = Thread(target=wait_for_sigterm, daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        end(f"another process is lost or hangs: {str(error).split('. ')[0]}")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(wakeup)
        thread.join()
        os.close(signals)
