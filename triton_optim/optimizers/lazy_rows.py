"""RMSprop on sparse gradients: rows that were left out are brought up to date when they matter."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..launch.chunking import Entry
from ..loading import step_dtype
from ..optimizer import FusedStep
from ..step.plan import look_at
from ..step.routing import Group, State, moved, refusal, strays
from ..step.row_wise import RowTable
from ..step.validation import describe

LAST_STEP = "last_step"  # int32 [rows]: the step up to which a row's averages are


class LazyRows(FusedStep):
    """The option `sparse="lazy"` of RMSprop."""

    _row_state = LAST_STEP
    _rows_read_step = True

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: `sparse="lazy"` does not go with the group.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._extras.sparse is not None and (reason := self._lazy_refusal(group)):
            del self.param_groups[-1]
            raise ValueError(f"sparse='lazy' does not go with {reason}")

    def _lazy_refusal(self, group: Group) -> str | None:
        """What a row that was left out could not be spared for, or not in the kernel."""
        excluded = {
            "momentum, which moves every row at every step": group["momentum"] != 0,
            "weight_decay, which moves every row at every step": group["weight_decay"] != 0,
            "a tensor as alpha, which may change unseen": isinstance(group["alpha"], Tensor),
            "capturable=True: a capture would repeat the rows of its step": group["capturable"],
            f"{self._group_refusal(group)}, which is torch's way": self._group_refusal(group),
            "max_grad_norm: clip the gradients before the step": self.max_grad_norm is not None,
        }
        return next((reason for reason, is_on in excluded.items() if is_on), None)

    def _planned_step(self) -> None:
        if self._extras.sparse is not None:
            alphas = [group["alpha"] for group in self.param_groups]
            before = self._internals.alphas
            if before != alphas:
                self._check_hyperparameters()
            if before is not None and before != alphas[: len(before)]:
                self._catch_up()
            self._internals.alphas = alphas
        super()._planned_step()

    def _catch_up(self) -> None:
        """Do to every row's averages what steps with a gradient of zero would have done.

        Raises:
            RuntimeError: state does not fit its parameter, or kernels do not run where it is.
        """
        entries: dict[torch.device, list[Entry]] = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            names, flags = self._state_names(group), self._flags(group) | {"CATCH_UP"}
            for position, param in enumerate(group["params"]):
                if LAST_STEP not in self.state.get(param, {}):
                    continue
                where = describe(group, index, position)
                if reason := refusal(param, param, by_rows=True):
                    raise RuntimeError(f"sparse='lazy' cannot bring {where} up to date: {reason}")
                self._check_state(param, group, where, kernels=True)
                state = self.state[param]
                for name in strays(param, state, names):
                    state[name] = moved(param, state[name])
                # The rule reads no gradient: the parameter takes its place.
                look = look_at(param, param, by_rows=True)
                entry = Entry(
                    0, param, param, param, look, (), index, flags, names,
                    row_state=LAST_STEP, where=where,
                )  # fmt: skip
                entries[param.device].append(entry)
        alphas = self._internals.alphas or []
        since = [{**group, "alpha": a} for group, a in zip(self.param_groups, alphas, strict=False)]
        hypers = self._scalars([*since, *self.param_groups[len(since) :]])
        for device, here in entries.items():
            on_device = self._counts_on_device
            RowTable(self, device, here, hypers, counts_on_device=on_device).catch_up(hypers)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, in torch's format; see `torch.optim.Optimizer.state_dict`.

        With `sparse="lazy"` every row is brought up to date first, so that `last_step` is left out.
        What it returns is of this step: save it, or load it, before the next one.

        Raises:
            RuntimeError: as `_catch_up`.
        """
        if self._extras.sparse is None:
            return super().state_dict()
        self._catch_up()
        state = self.state
        try:
            self.state = defaultdict(dict)
            for param, values in state.items():
                step = {"step": values["step"].to(step_dtype())} if LAST_STEP in values else {}
                kept = {k: v for k, v in values.items() if k != LAST_STEP}
                self.state[param] = {**kept, **step}
            return super().state_dict()
        finally:
            self.state = state

    def _new_step(self, param: Tensor, group: Group, dtype: torch.dtype | None = None) -> Tensor:
        """In float64: float32 stops counting at 2^24, where rows would lose steps."""
        dtype = dtype if self._extras.sparse is None else torch.float64
        return super()._new_step(param, group, dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._extras.sparse is not None:
            for values in self.state.values():
                step = values.get("step")
                if isinstance(step, Tensor) and step.dtype != torch.float64:
                    step.data = step.double()

    def _by_rows(self, grad: Tensor, state: State) -> bool:
        return super()._by_rows(grad, state) or LAST_STEP in state

    def _row_refusal(self, group: Group) -> str | None:
        if self._extras.sparse is None:
            return "its gradient is sparse, without sparse='lazy'"
        return self._lazy_refusal(group)

    def _check_leaving(
        self, param: Tensor, grad: Tensor, group: Group, where: str, reason: str
    ) -> None:
        super()._check_leaving(param, grad, group, where, reason)
        behind = LAST_STEP in self.state.get(param, {})
        if self._extras.sparse is not None and (behind or grad.layout != torch.strided):
            raise RuntimeError(
                f"sparse='lazy' cannot take {where}: {reason}; use the kernels, which run on a GPU "
                "and under TRITON_INTERPRET=1, or go on from a state_dict() with dense gradients"
            )

    def _has_row_state(self, state: State) -> bool:
        return LAST_STEP in state

    def _row_dtype(self, param: Tensor) -> torch.dtype:
        return torch.int32

    def _new_row_state(self, param: Tensor, state: State) -> Tensor:
        last = torch.zeros(param.shape[:1], dtype=torch.int32, device=param.device)
        return last + state["step"].to(torch.int32) if "step" in state else last
