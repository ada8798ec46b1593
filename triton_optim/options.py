"""What an optimizer of this package can do beside its rule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, TypedDict

from .storage import StateDtype, StorageOptions

Group = dict[str, Any]

OF_ALL_GRADIENTS = frozenset({"max_grad_norm", "error_if_nonfinite", "skip_nonfinite"})


class BaseOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer; see `FusedOptimizer`."""

    max_grad_norm: float | None
    error_if_nonfinite: bool
    skip_nonfinite: bool
    master_weight_bits: int | None
    stochastic_rounding: bool | None
    rounding_seed: int
    state_dtype: StateDtype | Mapping[str, StateDtype] | None


class CommonOptions(BaseOptions, total=False):
    """Those of an optimizer whose torch class takes no `capturable`."""

    capturable: bool


class DecayOptions(BaseOptions, total=False):
    """Those of one whose torch class knows L2 alone: SGD, Adagrad, RMSprop."""

    decoupled_weight_decay: bool


class CommonDecayOptions(CommonOptions, DecayOptions, total=False):
    """Both."""


@dataclass
class Options(StorageOptions):
    """Options that torch's optimizers lack.

    They belong to the optimizer and not to its groups, so that state dicts stay torch's.

    Raises:
        ValueError: options that exclude each other, or an invalid value.
    """

    OF_THE_WHOLE: ClassVar = frozenset(
        {
            *OF_ALL_GRADIENTS,
            "sparse",
            "decoupled_weight_decay",
            *StorageOptions.__annotations__,
        }
    )

    fused: bool | None = None  # for a class whose groups have no `fused`
    capturable: bool = False  # for a class whose groups have no `capturable`
    max_grad_norm: float | None = None
    error_if_nonfinite: bool = False
    skip_nonfinite: bool = False
    sparse: str | None = None  # "lazy": see RMSprop
    decoupled_weight_decay: bool = False  # for a class whose groups have no such flag
    master_weight_bits: int | None = None
    stochastic_rounding: bool | None = None
    rounding_seed: int = 0
    state_dtype: StateDtype | Mapping[str, StateDtype] | None = None

    def __post_init__(self) -> None:
        self.check_storage()
        if self.sparse not in (None, "lazy"):
            raise ValueError(f"Invalid sparse value: {self.sparse!r}; give 'lazy' or None")
        if self.max_grad_norm is not None:
            self.max_grad_norm = checked_max_norm(self.max_grad_norm, "max_grad_norm")
        for name in ("error_if_nonfinite", "skip_nonfinite"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; give True or False")
            if getattr(self, name) and self.max_grad_norm is None:
                raise ValueError(
                    f"{name}=True looks at the norm of the gradients; give max_grad_norm too "
                    "(float('inf') clips nothing)"
                )
        if self.error_if_nonfinite and self.skip_nonfinite:
            raise ValueError("error_if_nonfinite and skip_nonfinite exclude one another; choose")

    def repeated_by(self, group: Group) -> set[str]:
        """Of these options, those that a parameter group has too, with the same value.

        But for those that look at all gradients, which a part of the optimizer does not see.
        """
        names = (self.OF_THE_WHOLE - OF_ALL_GRADIENTS) & group.keys()
        return {name for name in names if group[name] == getattr(self, name)}

    def is_fused(self, group: Group) -> bool | None:
        """True insists on the kernels for a parameter group, False excludes them."""
        fused: bool | None = group.get("fused", self.fused)
        return fused

    def is_capturable(self, group: Group) -> bool:
        """Whether a CUDA graph may capture the step of a parameter group."""
        return bool(group.get("capturable", self.capturable))

    def unsupported(self, group: Group) -> str | None:
        """Why no kernel steps a parameter group, or None."""
        for flag in ("foreach", "differentiable"):
            if group.get(flag):
                return f"{flag}=True"
        return "fused=False" if self.is_fused(group) is False else None


def checked_max_norm(max_norm: float, name: str) -> float:
    """`max_norm` as a float; TypeError if it is no number, ValueError if it is negative or NaN."""
    value = float(max_norm)
    if math.isnan(value) or value < 0:
        raise ValueError(f"Invalid {name} value: {max_norm}; it must be 0 or more")
    return value


def defaults_of(
    optimizer_class: type, hyperparameters: object, args: Sequence[Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Of a class without torch's constructor: its rule's, or a dict from its own constructor.

    Args:
        optimizer_class: for messages.
        hyperparameters: the rule's.
        args, given: what was given after `params`, without options.

    Raises:
        TypeError: an argument that there is not.
    """
    known = {**hyperparameters} if isinstance(hyperparameters, Mapping) else {}
    handed_on = bool(args) and isinstance(args[0], dict)
    if handed_on:
        known, args = args[0], args[1:]
    unknown = sorted(given if handed_on else given.keys() - known.keys())
    if args or unknown:
        what = f"an unexpected keyword argument {unknown[0]!r}" if unknown else f"{args[0]!r}"
        raise TypeError(
            f"{optimizer_class.__name__}(params, ...) got {what}; its hyperparameters are keywords "
            f"{[*known]}, or what its own constructor hands on as a dict"
        )
    return {**known, **given}


def signature(
    constructor: Callable[..., None] | None, more: Mapping[str, object], without: Collection[str]
) -> inspect.Signature:
    """An optimizer's, each option by its name.

    Args:
        constructor: what takes `self`, its own arguments and maybe options; None: only `params`.
        more: names and defaults of arguments that the optimizer takes besides, and options too.
        without: options that it does not take.
    """
    known = {"params": inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)}
    if constructor is not None:
        known = dict([*inspect.signature(constructor).parameters.items()][1:])
    ours = [name for name, p in known.items() if str(p.annotation).endswith("Options]")]
    keyword = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    options = fields(Options) if ours or more or constructor is None else ()
    named = [
        *(p for name, p in known.items() if name not in ours),
        *(keyword(name, default=value) for name, value in more.items() if name not in known),
        *(
            keyword(option.name, default=option.default, annotation=option.type)
            for option in options
            if option.name not in {*known, *more, *without}
        ),
    ]
    return inspect.Signature(named, return_annotation=None)
