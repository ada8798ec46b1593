"""Whether a step happens and how its gradients are scaled, as far as the host knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options


class StepConditions(NamedTuple):
    """What decides, on the device, about one step."""

    enabled: frozenset[str] = frozenset()  # FOUND_INF, UNSCALE, CLIP, SKIP_NONFINITE
    found_inf: Tensor | None = None  # float32 []; anything but 0 skips the step
    grad_scale: Tensor | None = None  # float32 []; gradients are divided by it
    max_norm: float | None = None
    skip_nonfinite: bool = False

    @classmethod
    def read(cls, attributes: Mapping[str, object], options: Options) -> StepConditions:
        """From what a GradScaler has set on the optimizer, and the options.

        Raises:
            RuntimeError: a GradScaler's number is no tensor of one number.
        """
        found_inf, grad_scale = attributes.get("found_inf"), attributes.get("grad_scale")
        if found_inf is None and grad_scale is None and options.max_grad_norm is None:
            return UNCONDITIONAL
        inf = as_scalar_tensor(found_inf, "found_inf")
        scale = as_scalar_tensor(grad_scale, "grad_scale")
        conditions = {
            "FOUND_INF": inf is not None,
            "UNSCALE": scale is not None,
            "CLIP": options.max_grad_norm is not None,
            "SKIP_NONFINITE": options.skip_nonfinite,
        }
        enabled = frozenset(name for name, is_on in conditions.items() if is_on)
        return cls(enabled, inf, scale, options.max_grad_norm, options.skip_nonfinite)

    @property
    def may_skip(self) -> bool:
        return self.found_inf is not None or self.skip_nonfinite

    def check_device(self, device: torch.device) -> None:
        """Refuse numbers that kernels on `device` cannot be given without waiting.

        Raises:
            RuntimeError: one is on another kind of device.
        """
        for name, value in (("found_inf", self.found_inf), ("grad_scale", self.grad_scale)):
            if value is not None and value.device.type != device.type:
                raise RuntimeError(
                    f"optimizer.{name} is on {value.device}, parameters on {device}; make the "
                    f"scaler on their device: torch.amp.GradScaler({device.type!r})"
                )

    def kernel_args(self, device: torch.device) -> dict[str, Tensor]:
        """The kernels' arguments that are another tensor at every step."""
        scalars = {"found_inf_ptr": self.found_inf, "grad_scale_ptr": self.grad_scale}
        return {
            name: scalar if scalar.device == device else scalar.to(device, non_blocking=True)
            for name, scalar in scalars.items()
            if scalar is not None
        }

    def is_taken_sync(self, norm: Tensor | None) -> bool:
        """Whether the step happens; waits for the device."""
        if self.found_inf is not None and self.found_inf.item() != 0:
            return False
        return not (self.skip_nonfinite and norm is not None and not math.isfinite(norm.item()))

    def unscale_and_clip_(self, grads: list[Tensor], norm: Tensor | None) -> None:
        """Unscale and clip in place, as GradScaler and clip_grad_norm_ do."""
        if self.grad_scale is not None:
            factor = 1 / self.grad_scale.item()
            for grad in grads:
                (grad._values() if grad.is_sparse else grad).mul_(factor)
        if self.max_norm is not None and norm is not None:
            coefficient = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(coefficient.to(grad.device))


def as_scalar_tensor(value: object, name: str) -> Tensor | None:
    """A GradScaler's number as the kernels read it: float32, one element.

    Raises:
        RuntimeError: it is no tensor of one real number.
    """
    if value is None or (not isinstance(value, Tensor) and value == 0):
        return None  # without gradients a scaler tells a `found_inf` that is just 0
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise RuntimeError(f"optimizer.{name} is {value!r}; it must be a tensor of one real number")
    return value.detach().to(torch.float32)


UNCONDITIONAL = StepConditions()
