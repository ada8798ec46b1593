"""Whether a step happens and how its gradients are scaled, as far as the host knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


@dataclass
class Extras:
    """Options that torch's optimizers lack.

    They belong to the optimizer and not to its groups, so that state dicts stay torch's.
    """

    OF_THE_WHOLE: ClassVar = frozenset(
        {"max_grad_norm", "error_if_nonfinite", "skip_nonfinite", "sparse"}
    )

    fused: bool | None = None  # for a class whose groups have no `fused`
    capturable: bool = False  # for a class whose groups have no `capturable`
    max_grad_norm: float | None = None
    error_if_nonfinite: bool = False
    skip_nonfinite: bool = False
    sparse: str | None = None  # "lazy": see RMSprop

    def __post_init__(self) -> None:
        if self.sparse not in (None, "lazy"):
            raise ValueError(f"Invalid sparse value: {self.sparse!r}; give 'lazy' or None")
        if self.max_grad_norm is not None:
            self.max_grad_norm = checked_max_norm(self.max_grad_norm, "max_grad_norm")
        for name in ("error_if_nonfinite", "skip_nonfinite"):
            if getattr(self, name) and self.max_grad_norm is None:
                raise ValueError(
                    f"{name}=True looks at the norm of the gradients; give max_grad_norm too "
                    "(float('inf') clips nothing)"
                )
        if self.error_if_nonfinite and self.skip_nonfinite:
            raise ValueError("error_if_nonfinite and skip_nonfinite exclude one another; choose")


def checked_max_norm(max_norm: float, name: str) -> float:
    """`max_norm` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or NaN.
    """
    value = float(max_norm)
    if math.isnan(value) or value < 0:
        raise ValueError(f"Invalid {name} value: {max_norm}; it must be 0 or more")
    return value


class Gate(NamedTuple):
    """What decides, on the device, about one step."""

    kinds: frozenset[str] = frozenset()  # FOUND_INF, UNSCALE, CLIP, SKIP_NONFINITE: what is below
    found_inf: Tensor | None = None  # float32 []; anything but 0 skips the step
    grad_scale: Tensor | None = None  # float32 []; gradients are divided by it
    max_norm: float | None = None
    skip_nonfinite: bool = False

    @classmethod
    def of(cls, found_inf: Tensor | None, grad_scale: Tensor | None, extras: Extras) -> Gate:
        """Of what a GradScaler tells, and the options."""
        kinds = {
            "FOUND_INF": found_inf is not None,
            "UNSCALE": grad_scale is not None,
            "CLIP": extras.max_grad_norm is not None,
            "SKIP_NONFINITE": extras.skip_nonfinite,
        }
        on = frozenset(kind for kind, on in kinds.items() if on)
        return cls(on, found_inf, grad_scale, extras.max_grad_norm, extras.skip_nonfinite)

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

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The kernels' arguments that are another tensor at every step."""
        scalars = {"found_inf_ptr": self.found_inf, "grad_scale_ptr": self.grad_scale}
        return {
            name: scalar if scalar.device == device else scalar.to(device, non_blocking=True)
            for name, scalar in scalars.items()
            if scalar is not None
        }

    def does_happen(self, norm: Tensor | None) -> bool:
        """Whether the step happens; waits for the device."""
        if self.found_inf is not None and self.found_inf.item() != 0:
            return False
        return not (self.skip_nonfinite and norm is not None and not math.isfinite(norm.item()))

    def apply(self, grads: list[Tensor], norm: Tensor | None) -> None:
        """Unscale and clip in place, as GradScaler and clip_grad_norm_ do."""
        if self.grad_scale is not None:
            factor = 1 / self.grad_scale.item()
            for grad in grads:
                (grad._values() if grad.is_sparse else grad).mul_(factor)
        if self.max_norm is not None and norm is not None:
            coefficient = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(coefficient.to(grad.device))


def told(value: object, name: str) -> Tensor | None:
    """A GradScaler's number as the kernels read it: float32, one element.

    Raises:
        RuntimeError: it is no tensor of one real number.
    """
    if value is None or (not isinstance(value, Tensor) and value == 0):
        return None  # without gradients a scaler tells a `found_inf` that is just 0
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise RuntimeError(f"optimizer.{name} is {value!r}; it must be a tensor of one real number")
    return value.detach().to(torch.float32)
