"""CUDA graph capture: whether a step goes into a graph, and whether its replays would be steps."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..launch import backend
from ..options import Group, Options
from ..rule import Rule
from ..tensors.sharding import local
from .conditions import StepConditions
from .view import OptimizerView


def _is_captured(gpus: Collection[torch.device]) -> bool:
    """Whether a CUDA graph captures what kernels do on these GPUs; an error if not all of it."""
    if not gpus:
        return False
    captured = any(map(backend.is_capturing, gpus))
    if not (captured or torch.cuda.is_current_stream_capturing()):
        return False
    places = " and ".join(sorted(map(str, gpus)))
    if len(gpus) > 1:
        raise RuntimeError(
            f"a CUDA graph is captured, but parameters are on {places}; give the parameters of "
            "each GPU an optimizer and a graph of their own"
        )
    if not captured:
        raise RuntimeError(
            f"a CUDA graph is captured on another GPU than the parameters', which are on "
            f"{places}; capture within `with torch.cuda.device(...)` of that GPU"
        )
    return True


def check_capture(
    view: OptimizerView,
    conditions: StepConditions,
    name: str,
    gpus: Collection[torch.device],
    *,
    has_fallback: bool = False,
    is_prepared: bool = False,
) -> bool:
    """Whether a CUDA graph captures the step.

    Args:
        name: of the optimizer's class.
        gpus: where its kernels run.
        has_fallback: whether torch's implementation steps some parameters.
        is_prepared: whether there was a step like this one before.

    Raises:
        RuntimeError: one does, and its replays would not be steps.
    """
    if not _is_captured(gpus):
        return False
    name = f"{name}.step() was called under CUDA graph capture"
    if not all(map(view.options.is_capturable, view.groups)):
        raise RuntimeError(
            f"{name}: a replay would repeat this step's rates and counts; pass capturable=True"
        )
    if view.options.error_if_nonfinite:
        raise RuntimeError(f"{name}, but error_if_nonfinite waits for the device; leave it out")
    if has_fallback and (conditions.may_skip or conditions.grad_scale is not None):
        raise RuntimeError(
            f"{name}, but what falls back to torch's implementation waits for the device to learn "
            "whether to step; leave GradScaler and skip_nonfinite out"
        )
    for index, group in enumerate(view.groups):
        lr = group.get("lr")
        if _reads_rate(view.rule, group) and not (
            isinstance(lr, Tensor) and lr.device.type in backend.CAPTURABLE_DEVICE_TYPES
        ):
            raise RuntimeError(
                f"{name}, but lr of group {index} is {lr!r}, which a replay would repeat; give "
                'a tensor: lr=torch.tensor(1e-3, device="cuda")'
            )
        if "max_momentum" in group:  # CyclicLR and OneCycleLR write momentum or betas as floats
            raise RuntimeError(
                f"{name}, but a scheduler cycles the momentum of group {index}, which a replay "
                "would repeat; give the scheduler cycle_momentum=False"
            )
    if not is_prepared:
        raise RuntimeError(
            f"{name} before there was a step like it to repeat; run a few steps first, with "
            "gradients for the same parameters and under the same GradScaler, on a side stream"
        )
    if not backend.captures_pinned_memory():
        raise RuntimeError(
            f"{name}: torch {torch.__version__} cannot allocate pinned memory then; use 2.11 "
            "or newer"
        )
    return True


def _reads_rate(rule: Rule, group: Group) -> bool:
    """Whether updates depend on the learning rate; Rprop's do not."""
    try:
        rule.values({name: value for name, value in group.items() if name != "lr"})
    except KeyError:
        return True
    return False


def check_capturable(options: Options, param: Tensor, group: Group, where: str) -> None:
    """Refuse a parameter that no graph can capture: one on the CPU."""
    if not options.is_capturable(group):
        return
    device = local(param).device
    if device.type not in backend.CAPTURABLE_DEVICE_TYPES:
        raise RuntimeError(
            f"capturable=True, but {where} is on {device}: only what runs on a GPU can be "
            "captured; move it there or leave `capturable` out"
        )
