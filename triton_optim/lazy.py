"""RMSprop's state of rows without a gradient, brought up to date when it is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import describe
from .cuts import Entry
from .rows import RowTable

if TYPE_CHECKING:
    from .rmsprop import RMSprop

LAST_STEP = "last_step"  # int32 [rows]: the step up to which a row's averages are


def catch_up(optimizer: RMSprop, alphas: Sequence[float | Tensor]) -> None:
    """Do to the averages of every row what steps with a gradient of zero would have done.

    Args:
        optimizer: whatever its parameters' gradients are.
        alphas: by group, that of the steps since.

    Raises:
        RuntimeError: state does not fit its parameter, or the kernels do not run where it is.
    """
    entries: dict[torch.device, list[Entry]] = defaultdict(list)
    for index, group in enumerate(optimizer.param_groups):
        names, flags = optimizer._state_names(group), optimizer._flags(group)
        for position, param in enumerate(group["params"]):
            if LAST_STEP not in optimizer.state.get(param, {}):
                continue
            where = describe(group, index, position)
            if reason := optimizer._refusal(param, param, group):
                raise RuntimeError(f"sparse='lazy' cannot bring {where} up to date: {reason}")
            optimizer._check_state(param, group, where, kernels=True)
            # The rule reads no gradient: the parameter takes its place.
            entry = Entry(param, param, param, (), index, flags, names, False, LAST_STEP, where)
            entries[param.device].append(entry)
    groups = [{**g, "alpha": a} for g, a in zip(optimizer.param_groups, alphas, strict=True)]
    hypers = optimizer._scalars(groups)
    for device, here in entries.items():
        on_device = optimizer._counts_on_device
        RowTable(
            optimizer, device, here, hypers,
            counts_on_device=on_device, rule="rmsprop_catch_up_rule",
        ).run_once(hypers)  # fmt: skip
