"""One step: conditions, plan, tables, launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..options import Options
from .capture import check_capture
from .catch_up import catch_up
from .conditions import StepConditions
from .plan import Plan
from .planning import Planning
from .remainders import Remainders
from .routing import is_traced
from .step_counts import StepPool
from .view import OptimizerView

# Steps these parameters with torch's implementation; their gradients are unscaled and clipped.
Fallback = Callable[[OptimizerView, list[Tensor]], None]


@dataclass
class Stepper:
    """What an optimizer has beside torch's attributes.

    All of it is one object, which a wrapper shares that copies an optimizer's `__dict__`, or that
    passes on what it does not have itself.

    Args:
        options: those of the optimizer.
        option_names: of them, those that torch's class does not have itself.
        counters: makes step counts on the CPU.
    """

    options: Options
    option_names: frozenset[str]
    counters: StepPool = field(default_factory=StepPool)
    plan: Plan | None = None
    captured: tuple[Plan, ...] = ()  # CUDA graphs read their tables
    norm: Tensor | None = None  # float64 [], of the last step's gradients
    skipped: Tensor | None = None  # float32 [], how many steps were
    may_skip: bool = False  # whether a step may have been skipped by the device
    amp_scaling: bool = True  # what was assigned to `_step_supports_amp_scaling`
    remainders: Remainders = field(default_factory=Remainders)
    lazy_values: list[float] | None = None  # of the steps that rows may have been left out of

    def part(self) -> Stepper:
        """For a part of the optimizer's parameters."""
        return Stepper(self.options, self.option_names, self.counters, remainders=self.remainders)

    def step(
        self, view: OptimizerView, conditions: StepConditions, fallback: Fallback, name: str
    ) -> None:
        """Step an optimizer of the class `name`; `fallback` takes what the kernels cannot."""
        traced = is_traced()
        if traced:
            self.drop_plan(view)  # the one that is made now is of nothing that lasts
        self._watch_lazy_rows(view)
        plan, is_new = self.plan, False
        inputs = plan.read(view) if plan is not None else None
        if plan is None or inputs is None:
            plan, is_new = self._make_plan(view, conditions, name), True
            inputs = [group.first_inputs for group in plan.launch_groups]
        elif check_capture(
            view, conditions, name, plan.gpus,
            has_fallback=plan.has_fallback, is_prepared=plan.is_prepared(conditions),
        ):  # fmt: skip
            self.captured = (*self.captured, plan)
        plan.compile(inputs, conditions)
        copies = plan.upload(inputs, conditions)
        others = plan.fallback(view) if plan.has_fallback else []
        norm, is_taken = None, True
        if conditions.max_norm is not None:
            norm = self._record_norm(plan.grad_norm(others, conditions), conditions)
        if others:
            is_taken = conditions.is_taken_sync(norm)
            if is_taken:
                grads = [param.grad for param in others if param.grad is not None]
                conditions.unscale_and_clip_(grads, norm)
                fallback(view, others)
        plan.launch(inputs, copies, conditions)
        if conditions.skip_nonfinite:
            skipped = plan.skipped()
            self._count_skipped(torch.tensor(1.0 - is_taken) if skipped is None else skipped)
        if is_new and not traced:
            plan.commit_state(view)
            self.plan = plan

    def _make_plan(self, view: OptimizerView, conditions: StepConditions, name: str) -> Plan:
        previous = self.plan
        check_capture(view, conditions, name, previous.gpus if previous is not None else ())
        self.drop_plan(view)
        planning = Planning(view, previous)
        check_capture(view, conditions, name, planning.gpus)
        return planning.finish()

    def drop_plan(self, view: OptimizerView) -> None:
        """Let the next step look at everything again."""
        if self.plan is not None:
            self.plan.forget_skipped(view)
        self.plan = None

    def _watch_lazy_rows(self, view: OptimizerView) -> None:
        """Bring rows up to date before a hyperparameter changes that they missed steps of."""
        rows = view.rule.row_wise
        if rows is None or rows.lazy is None:
            return
        values, before = [group[rows.lazy] for group in view.groups], self.lazy_values
        if before != values:
            view.check_hyperparameters()
        if before is not None and before != values[: len(before)]:
            catch_up(view, before)
        self.lazy_values = values

    def _record_norm(self, norm: Tensor, conditions: StepConditions) -> Tensor:
        """For `grad_norm`.

        Raises:
            RuntimeError: it is not finite, and that is to be an error; but not of a step that a
                GradScaler skips.
        """
        self.norm = norm
        raises = self.options.error_if_nonfinite and conditions.is_taken_sync(None)
        if raises and not norm.isfinite():
            raise RuntimeError(
                f"the norm of the gradients is {norm.item()}: nothing was stepped; leave "
                "error_if_nonfinite out to step all the same, or give skip_nonfinite=True"
            )
        return norm

    def _count_skipped(self, skipped: Tensor) -> None:
        count = self.skipped
        if count is None or count.device != skipped.device:
            with torch.inference_mode(False):
                here = torch.zeros(skipped.shape, dtype=skipped.dtype, device=skipped.device)
            count = self.skipped = here if count is None else here.copy_(count)
        count.add_(skipped)  # in place, so that replays of a graph count too
