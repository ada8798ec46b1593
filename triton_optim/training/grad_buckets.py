"""Parameters that step together during the backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import inf
from operator import itemgetter

import torch
from torch import Tensor

from ..optimizer import FusedOptimizer
from ..options import Group
from ..step.validation import describe
from ..tensors.sharding import local

ParamIndex = tuple[int, int]  # index of a group, position in it


class GradBucket:
    """Steps its parameters when their gradients are complete.

    Args:
        optimizer: whose state, groups and rule these are.
        places: where the parameters, of one device, stand in `optimizer.param_groups`.
    """

    def __init__(self, optimizer: FusedOptimizer, places: Iterable[ParamIndex]) -> None:
        self._optimizer = optimizer
        self._places = sorted(places)  # the order in which a plan keeps state
        params = self.params
        self._device = params[0].device
        self._gpu = self._device.index if params[0].is_cuda else None
        self._own = [(i, [*of_group]) for i, of_group in groupby(self._places, key=itemgetter(0))]
        self._stepper = optimizer._stepper.part()  # which keeps the plan of these parameters
        self.begin()

    @property
    def params(self) -> list[Tensor]:
        """Its parameters, each once; the optimizer holds them, and this does not."""
        groups = self._optimizer.param_groups
        return [*dict.fromkeys(groups[i]["params"][position] for i, position in self._places)]

    def begin(self) -> None:
        """A backward pass begins."""
        self._streams: dict[int, int] = {}  # by index, on which stream a gradient came
        self._missing = sum([param.requires_grad for param in self.params])
        self._stepped = False

    def grad_ready(self, index: int) -> None:
        """A gradient is complete; step if it was the last one.

        Raises:
            RuntimeError: it came before and was used, or what a step raises.
        """
        if index not in self._streams:
            self._missing -= 1
        elif self._stepped:
            raise RuntimeError(
                f"{self._name(index)} was updated before all of its gradient had come, since it is "
                "used in several checkpoints; pass use_reentrant=False to torch.utils.checkpoint"
            )
        gpu = self._gpu
        self._streams[index] = 0 if gpu is None else torch._C._cuda_getCurrentRawStream(gpu)
        if self._missing == 0:
            self._step()

    def finish(self) -> None:
        """The pass ends: step with what came, if that is not all."""
        if self._streams and not self._stepped:
            self._step()

    def _step(self) -> None:
        optimizer = self._optimizer
        self._join_streams()
        groups, params, get = optimizer.param_groups, self.params, optimizer.state.get
        own = [{**groups[i], **_lists(groups[i], places)} for i, places in self._own]
        state = defaultdict(dict, {p: s for p in params if (s := get(p)) is not None})
        try:
            optimizer._fused_step(own, state, self._stepper)
        finally:
            optimizer.state.update(state)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # else schedulers warn
        for param in params:
            param.grad = None
        self._stepped = True

    def _name(self, index: int) -> str:
        groups = self._optimizer.param_groups
        return next(
            describe(groups[i], i, position)
            for i, position in self._places
            if groups[i]["params"][position] is self.params[index]
        )

    def _join_streams(self) -> None:
        """Let this step's stream wait for those on which other gradients came."""
        if self._gpu is None:
            return
        stream = torch.cuda.current_stream(self._device)
        others = set(self._streams.values()) - {stream.cuda_stream}
        for other in others:
            stream.wait_stream(torch.cuda.ExternalStream(other, device=self._device))
        for param in self.params if others else ():
            grad = param.grad  # which is freed before the step has run
            if grad is not None and grad.layout == torch.sparse_coo:
                grad._indices().record_stream(stream)
                grad._values().record_stream(stream)
            elif grad is not None:
                local(grad).record_stream(stream)


def assign_buckets(params: Iterable[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Parameters one after another into buckets, each of one device and dtype.

    Args:
        params: in the order in which their gradients are expected.
        bucket_bytes: that a bucket holds at most; a larger parameter is alone.
    """
    buckets: list[list[Tensor]] = []
    latest: dict[object, tuple[list[Tensor], float]] = {}
    for param in params:
        n_bytes = local(param).nbytes
        if n_bytes > bucket_bytes:
            buckets.append([param])
            continue
        # What is frozen would hold up the others when it is trained again.
        kind = (param.device, param.dtype, param.requires_grad)
        bucket, size = latest.get(kind, ([], inf))
        if size + n_bytes > bucket_bytes:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(param)
        latest[kind] = bucket, size + n_bytes
    return buckets


def _lists(group: Group, places: Sequence[ParamIndex]) -> Group:
    """What is not the same in a group over some of its parameters."""
    lists = [name for name in ("params", "param_names") if name in group]
    own: Group = {name: [group[name][position] for _, position in places] for name in lists}
    return {**own, "_places": places}
