"""What our optimizers have beside torch's: clipping, GradScaler inside the kernel, capture."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from types import FrameType

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .launch import backend
from .step.conditions import Extras, Gate, told
from .step.plan import Plan, all_params
from .step.routing import Group, group_refusal
from .step.step_counts import StepPool
from .tensors.sharding import local


@dataclass
class Internals:
    """What an optimizer has beside torch's attributes.

    All of it is one object, which a wrapper shares that copies an optimizer's `__dict__`, or that
    passes on what it does not have itself.
    """

    extras: Extras
    options: frozenset[str]  # names of those extras that the class takes
    steps: StepPool = field(default_factory=StepPool)
    plan: Plan | None = None
    captured: tuple[Plan, ...] = ()  # CUDA graphs read their tables
    norm: Tensor | None = None  # float64 [], of the last step's gradients
    skipped: Tensor | None = None  # float32 [], how many steps were
    may_skip: bool = False  # whether a step may have been skipped by the device
    amp_scaling: bool = True  # what was assigned to `_step_supports_amp_scaling`
    alphas: list[float] | None = None  # of the steps that rows may have been left out of


class GatedOptimizer(torch.optim.Optimizer):
    """The options of `Extras`, and what becomes of them at a step."""

    _internals: Internals

    @property
    def _extras(self) -> Extras:
        return self._internals.extras

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and skipping to the step.

        As with torch, `fused=True` asks for it. Not where no kernel runs, nor where something
        stands between the scaler and the step, which would see scaled gradients, or take the step's
        call for a step: a hook, another `step`, a wrapper to which the scaler was given.
        """
        return (
            self._internals.amp_scaling
            and all(self._fused(g) and not self._group_refusal(g) for g in self.param_groups)
            and any(local(p).device.type == backend.DEVICE_TYPE for p in all_params(self))
            and not self._hooks
            and not self._is_overridden()
            and not _is_scaled_through_wrapper(self)
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        self._internals.amp_scaling = supports

    @property
    def _hooks(self) -> bool:
        """Whether there are hooks of steps."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which a step clips its gradients, all of them together; None for none.

        May be set between steps.

        Raises:
            ValueError: set to something negative or to NaN.
        """
        return self._extras.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_norm: float | None) -> None:
        internals = self._internals
        before = internals.extras.max_grad_norm
        internals.extras = replace(internals.extras, max_grad_norm=max_norm)
        self.defaults["max_grad_norm"] = internals.extras.max_grad_norm
        if (before is None) != (max_norm is None):
            self._drop_plan()

    def _drop_plan(self) -> None:
        """Let the next step look at everything again."""
        internals = self._internals
        if internals.plan is not None:
            internals.plan.forget_skipped(self)
        internals.plan = None

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, on the device: [].

        float64 where a parameter is, otherwise float32. Of unscaled gradients under a GradScaler;
        over all ranks where parameters are DTensors. None without `max_grad_norm` and before the
        first step.
        """
        norm = self._internals.norm
        if norm is None or self.max_grad_norm is None:
            return None
        dtypes = (param.dtype for param in all_params(self))
        double = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
        return norm.to(torch.float64 if double else torch.float32, copy=True)

    @property
    def skipped_steps(self) -> Tensor | None:
        """How many steps `skip_nonfinite=True` has skipped, on the device: int64 []; None without.

        Those count too that a GradScaler skipped.
        """
        if not self._extras.skip_nonfinite:
            return None
        skipped = self._internals.skipped
        return torch.zeros(()).long() if skipped is None else skipped.long()

    def _is_overridden(self) -> bool:
        """Whether calling `step` runs another one: a subclass's, or one put on the instance."""
        raise NotImplementedError

    def _group_refusal(self, group: Group) -> str | None:
        """Why a whole parameter group goes torch's way, or None."""
        return group_refusal(group, self._fused(group))

    def _fused(self, group: Group) -> bool | None:
        fused: bool | None = group.get("fused", self._extras.fused)
        return fused

    def _capturable(self, group: Group) -> bool:
        return bool(group.get("capturable", self._extras.capturable))

    @property
    def _counts_on_device(self) -> bool:
        """Whether steps must be counted on the device, because the host does not know them."""
        return self._internals.may_skip or any(map(self._capturable, self.param_groups))

    def _gate(self) -> Gate:
        """What decides about this step: a GradScaler's attributes, and the options.

        Raises:
            RuntimeError: a GradScaler's number is no tensor of one number.
        """
        mine = vars(self)
        found_inf, grad_scale = mine.get("found_inf"), mine.get("grad_scale")
        extras = self._internals.extras
        if found_inf is None and grad_scale is None and extras.max_grad_norm is None:
            return _NO_GATE
        numbers = (told(found_inf, "found_inf"), told(grad_scale, "grad_scale"))
        return Gate.of(*numbers, extras)

    def _keep_norm(self, norm: Tensor, gate: Gate) -> None:
        """For `grad_norm`.

        Raises:
            RuntimeError: it is not finite, and that is to be an error; but not of a step that a
                GradScaler skips.
        """
        self._internals.norm = norm
        if self._extras.error_if_nonfinite and gate.does_happen(None) and not norm.isfinite():
            raise RuntimeError(
                f"the norm of the gradients is {norm.item()}: nothing was stepped; leave "
                "error_if_nonfinite out to step all the same, or give skip_nonfinite=True"
            )

    def _count_skipped(self, skipped: Tensor) -> None:
        count = self._internals.skipped
        if count is None or count.device != skipped.device:
            with torch.inference_mode(False):
                here = torch.zeros(skipped.shape, dtype=skipped.dtype, device=skipped.device)
            count = self._internals.skipped = here if count is None else here.copy_(count)
        count.add_(skipped)  # in place, so that replays of a graph count too

    def _check_capture(self, plan: Plan, gate: Gate, *, ready: bool) -> None:
        """Refuse a capture whose replays would not be steps.

        Raises:
            RuntimeError: without `capturable`, with a rate that a replay could not change, with an
                option that waits for the device, or before a first step.
        """
        name = f"{type(self).__name__}.step() was called under CUDA graph capture"
        if not all(map(self._capturable, self.param_groups)):
            raise RuntimeError(
                f"{name}: a replay would repeat this step's rates and counts; pass capturable=True"
            )
        if self._extras.error_if_nonfinite:
            raise RuntimeError(f"{name}, but error_if_nonfinite waits for the device; leave it out")
        if plan.has_rest and (gate.may_skip or gate.grad_scale is not None):
            raise RuntimeError(
                f"{name}, but what goes torch's own way waits for the device to learn whether to "
                "step; leave GradScaler and skip_nonfinite out"
            )
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if not isinstance(lr, Tensor) or lr.device.type not in backend.CAPTURABLE_DEVICE_TYPES:
                raise RuntimeError(
                    f"{name}, but lr of group {index} is {lr!r}, which a replay would repeat; give "
                    'a tensor: lr=torch.tensor(1e-3, device="cuda")'
                )
        if not ready:
            raise RuntimeError(
                f"{name} before there was a step like it to repeat; run a few steps first, with "
                "gradients for the same parameters and under the same GradScaler, on a side stream"
            )
        if not backend.captures_pinned_memory():
            raise RuntimeError(
                f"{name}: torch {torch.__version__} cannot allocate pinned memory then; use 2.11 "
                "or newer"
            )

    def _check_capturable(self, param: Tensor, group: Group, where: str) -> None:
        """Refuse a parameter that no graph can capture.

        Raises:
            RuntimeError: it is on the CPU.
        """
        if not self._capturable(group):
            return
        device = local(param).device
        if device.type not in backend.CAPTURABLE_DEVICE_TYPES:
            raise RuntimeError(
                f"capturable=True, but {where} is on {device}: only what runs on a GPU can be "
                "captured; move it there or leave `capturable` out"
            )

    def _check_leaving(
        self, param: Tensor, grad: Tensor, group: Group, where: str, reason: str
    ) -> None:
        """Refuse torch's own way for a parameter where it does not do what was asked for.

        Raises:
            RuntimeError: torch's own step cannot be captured, or the gradient has no norm.
        """
        if self._capturable(group) and "capturable" not in group:
            raise RuntimeError(f"capturable=True, but the kernels cannot take {where}: {reason}")
        if grad.layout != torch.strided:
            self._check_norm(grad, where)

    def _check_rows(self, grad: Tensor, group: Group, where: str) -> None:
        """Refuse to update by rows where that does not do what was asked for.

        Raises:
            RuntimeError: the step is to be captured, or the gradient has no norm.
        """
        if self._capturable(group):
            raise RuntimeError(
                f"capturable=True, but {where} is updated by rows, of which a capture would repeat "
                "those of this step; leave `capturable` out, or give it an optimizer of its own"
            )
        self._check_norm(grad, where)

    def _check_norm(self, grad: Tensor, where: str) -> None:
        if self.max_grad_norm is not None:
            raise RuntimeError(
                f"max_grad_norm takes no {grad.layout} gradient, as that of {where}; make the "
                "gradient dense, or give the parameter an optimizer of its own"
            )


def _is_scaled_through_wrapper(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler asks on behalf of another object, where it will leave its numbers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.amp.GradScaler.step.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals.get("optimizer") is not optimizer


_NO_GATE = Gate()
