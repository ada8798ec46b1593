"""What stands between an optimizer's step and whoever calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

Step = Callable[..., Any]


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether something is to run before or after its step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def is_wrapped(optimizer: Optimizer, hooked: Step) -> bool:
    """Whether torch has wrapped its class's step: one that overrides ours, hooked as `hooked`."""
    step: Any = type(optimizer).step
    while step is not None:
        if getattr(step, "__code__", None) is hooked.__code__:
            return True
        step = getattr(step, "__wrapped__", None)
    return False


def is_overridden(optimizer: Optimizer, ours: Step) -> bool:
    """Whether calling its `step` runs another one: a subclass's, or one put on the instance."""
    step: Any = vars(optimizer).get("step", type(optimizer).step)
    # A scheduler's patch only tells it that the step was called.
    while getattr(step, "__globals__", None) is vars(lr_scheduler):
        step = step.__wrapped__
    return type(optimizer).step is not ours or getattr(step, "__func__", step) is not ours


def is_scaled_through_wrapper(optimizer: Optimizer) -> bool:
    """Whether a GradScaler asks on behalf of another object, where it will leave its numbers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.amp.GradScaler.step.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals.get("optimizer") is not optimizer
