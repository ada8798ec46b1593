"""An optimizer as the step sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from numbers import Real
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from ..launch import backend
from ..options import Group, Options
from ..rule import Rule, State
from ..storage import REMAINDER
from ..tensors.sharding import local
from .remainders import Remainders
from .step_counts import StepPool
from .validation import describe, place_of

_PARAMS = itemgetter("params")


class NamedParam(NamedTuple):
    """A parameter."""

    position: int  # among all of the optimizer's
    param: Tensor
    group_index: int
    group: Group
    where: str  # the parameter in words
    place: tuple[int, int]  # its group in the whole optimizer, and where it stands there


class OptimizerView(NamedTuple):
    """What an optimizer is now: nothing of it is kept from step to step."""

    rule: Rule
    groups: list[Group]
    state: MutableMapping[Tensor, State]
    defaults: Mapping[str, Any]
    options: Options
    option_names: frozenset[str]  # those of `options` that torch's class does not have itself
    counters: StepPool
    may_skip: bool  # whether a step may have been skipped by the device
    has_reference: bool  # whether anything but kernels can step its parameters
    remainders: Remainders

    @property
    def params(self) -> Iterable[Tensor]:
        return chain.from_iterable(map(_PARAMS, self.groups))

    def drop_stale_remainders(self) -> None:
        """Let parameters that were written since their latest update have no remainder."""
        held = ((param, self.state.get(param, {}).get(REMAINDER)) for param in self.params)
        self.remainders.drop(
            [(local(p), local(value)) for p, value in held if isinstance(value, Tensor)]
        )

    @property
    def lengths(self) -> list[int]:
        """How many parameters each group has."""
        return [*map(len, map(_PARAMS, self.groups))]

    @property
    def counts_on_device(self) -> bool:
        """Whether steps must be counted on the device, because the host does not know them."""
        return self.may_skip or any(map(self.options.is_capturable, self.groups))

    def named(self) -> Iterator[NamedParam]:
        """Every parameter."""
        position = 0
        for index, group in enumerate(self.groups):
            for i, param in enumerate(group["params"]):
                where, place = describe(group, index, i), place_of(group, index, i)
                yield NamedParam(position, param, index, group, where, place)
                position += 1

    def structure_key(self) -> list[tuple[object, ...]]:
        """What decides, beside the tensors, on their route and on which kernel they get."""
        rule, options = self.rule, self.options
        return [
            (
                rule.active_flags(group),
                options.unsupported(group),
                options.is_fused(group),
                options.is_capturable(group),
                rule.rows_unsupported(group, options),
            )
            for group in self.groups
        ]

    def hyperparameters(self, groups: Iterable[Group] | None = None) -> list[float | Tensor]:
        """Every group's, one after another; tensors only where they are on a GPU.

        `groups` may stand in for the optimizer's.
        """
        values = chain.from_iterable(map(self.rule.values, groups or self.groups))
        return [value if type(value) is float else as_scalar(value) for value in values]

    def check_hyperparameters(self) -> None:
        """Refuse values in groups that only look like numbers.

        Raises:
            TypeError: there is one, such as a learning rate that is a string.
            ValueError: a tensor of several elements.
        """
        numbers = [
            name
            for name, value in self.defaults.items()
            if isinstance(value, Real | Tensor) and not isinstance(value, bool)
        ]
        known = self.rule.hyperparameters
        numbers += [] if callable(known) else known
        for index, group in enumerate(self.groups):
            for name in numbers:
                value = group.get(name, 0)
                remedy = "give it a number, or a tensor of one element"
                if not hasattr(value, "__float__"):
                    raise TypeError(f"{name} of group {index} is {value!r}; {remedy}")
                if isinstance(value, Tensor) and value.numel() != 1:
                    found = f"has {value.numel()} elements"
                    raise ValueError(f"{name} of group {index} {found}; {remedy}")


def as_scalar(value: float | Tensor) -> float | Tensor:
    """A float, or a tensor on a GPU, which the device reads."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"a hyperparameter has {value.numel()} elements; give it one")
        if value.device.type in backend.CAPTURABLE_DEVICE_TYPES:
            return value
    return float(value)
