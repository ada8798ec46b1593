"""What an optimizer is to everything below its class: plain records, which know nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .options import Group, Options
from .scalar_state import ScalarState
from .storage import EIGHT_BITS, REMAINDER

State = dict[str, Any]
Scalars = tuple[float | Tensor, ...]

ARGUMENTS, ROW_ARGUMENTS = 6, 8  # of a rule's function
MAX_STATES = 3  # columns of the table of tensors for them: kernels/chunks.py
MAX_ROW_STATES = 2  # of that for rows: kernels/keys.py


@dataclass(frozen=True)
class StateTensor:
    """A state of the parameter's shape and memory format, and of its dtype if not said otherwise.

    Args:
        name: its key in `optimizer.state[param]`.
        initial: the value of every element before the first update, or what gives it for a
            parameter group. Both parts of a complex element start from it.
        when: whether a parameter group keeps it; None: every group does.
        is_denominator: never negative, and 0 in no sense but a start: in 8 bits it has neither a
            sign nor a zero. None: not said, and 8 bits or float16 are refused.
        is_exact: 8 bits are not enough for it.
    """

    name: str
    initial: float | Callable[[Group], float] = 0.0
    when: Callable[[Group], bool] | None = None
    is_denominator: bool | None = False
    is_exact: bool = False

    def new(self, param: Tensor, group: Group, dtype: torch.dtype | None = None) -> Tensor:
        """It, of a parameter before its first update."""
        value = self.initial(group) if callable(self.initial) else self.initial
        if value == 0:
            return torch.zeros_like(param, dtype=dtype)
        fill = complex(value, value) if param.is_complex() else value
        return torch.full_like(param, fill, dtype=dtype)


@dataclass(frozen=True)
class RowWise:
    """How a rule updates single rows: those of sparse gradients, or all of them.

    Args:
        unsupported: why rows of a group cannot be updated alone under these options, or None.
        function: the rule for rows, where it is not the dense one; see kernels/rules.py.
        state: name of the state that has one number a row.
        dtype: that state's, by parameter.
        initial: its value before the first update, by group.
        always: dense gradients are row-wise too, and every parameter has that state.
        reads_step: `function` reads the step whatever the flags.
        lazy: name of the hyperparameter by which a row's state changes at every step without a
            gradient. Rows are brought up to date when they have one again, or when it is changed;
            the row's state is then the step up to which they are.
        check_fallback: given gradient, state, parameter in words and reason, raises where nothing
            but the kernels can step the parameter.
    """

    unsupported: Callable[[Group, Options], str | None] = lambda group, options: None
    function: Any = None
    state: str | None = None
    dtype: Callable[[Tensor], torch.dtype] = lambda param: torch.int32
    initial: Callable[[Group], float] = lambda group: 0.0
    always: bool = False
    reads_step: bool = False
    lazy: str | None = None
    check_fallback: Callable[[Tensor, State, str, str], None] = lambda *_: None


@dataclass(frozen=True)
class Rule:
    """An update rule: its kernel function, and what the optimizer needs to know of it.

    Args:
        function: a `@triton.jit` function `(param, grad, state, hyper, step, FLAGS)` that returns
            the parameter and a tuple of states. `param`, `grad` and the states are blocks in
            arithmetic precision: float64 for float64 parameters, float32 otherwise. None where
            Triton is not installed.
        state: names of the states, in the function's order, or records of them.
        hyperparameters: names and defaults, which become arguments of the optimizer and, in this
            order, `hyper`; or what gives the values of `hyper` for a parameter group, of an
            optimizer that has a constructor of its own.
        flags: by name, made with `triton_optim.flag`, whether a parameter group sets it.
        counts_step: the state has `step`, how often a parameter was updated.
        reads_step: whether the function reads it, or the flags under which it does: a float64
            scalar, 0 at the first update. Where steps are not counted, it is 0 or 1.
        scalars: state of one number a tensor beside `step`; the function is given what it says in
            place of the step.
        doubles: `hyper` are float64 scalars; otherwise they are in arithmetic precision. A float64
            scalar makes a block that it is combined with float64.
        row_wise: how single rows are updated, if they can be.
        reference: `(param, grad, state, group)` in torch's operations, in place, for what the
            kernels cannot take.
        eager_state: torch's class makes the state in its constructor, from its defaults; it follows
            a parameter to another device.
        check_group: raises ValueError where a new parameter group does not go with the options.

    Raises:
        TypeError: `function` is no jit function with these arguments.
        ValueError: more states than a kernel takes, or a name twice.
    """

    function: Any
    state: tuple[str | StateTensor, ...] = ()
    hyperparameters: Mapping[str, float] | Callable[[Group], Scalars] = field(default_factory=dict)
    _: KW_ONLY
    flags: Mapping[str, Callable[[Group], bool]] = field(default_factory=dict)
    counts_step: bool = True
    reads_step: bool | frozenset[str] = False
    scalars: ScalarState | None = None
    doubles: bool = False
    row_wise: RowWise | None = None
    reference: Callable[[Tensor, Tensor, State, Group], None] | None = None
    eager_state: bool = False
    check_group: Callable[[Group, Options], None] = lambda group, options: None

    def __post_init__(self) -> None:
        function, rows = self.function, self.row_wise
        n_arguments = ROW_ARGUMENTS if rows is not None and rows.always else ARGUMENTS
        if function is not None and len(getattr(function, "arg_names", ())) != n_arguments:
            raise TypeError(
                f"the function of a Rule is {function!r}; give a @triton.jit function of (param, "
                "grad, state, hyper, step, FLAGS)"
            )
        names = [state.name for state in self.states]
        every = [*names, *self.counters, *([] if self.row_state is None else [self.row_state])]
        if len(names) > MAX_STATES or len({*every, REMAINDER}) <= len(every):
            raise ValueError(
                f"a Rule has the states {every}; it takes up to {MAX_STATES}, each named once, and "
                f"none of them 'step' or {REMAINDER!r}"
            )
        if (self.reads_step is True or self.scalars) and not self.counts_step:
            raise ValueError("reads_step=True needs counts_step=True, which makes the step")

    @cached_property
    def decoupled(self) -> Rule:
        """It, with weight decay that is not part of the gradient in every group."""
        return replace(self, flags={**self.flags, "DECOUPLED": lambda group: True})

    @cached_property
    def counting(self) -> Rule:
        """It, with every update counted in the state."""
        return replace(self, counts_step=True)

    @property
    def name(self) -> str:
        """The function's."""
        return getattr(self.function, "__name__", "the rule")

    @property
    def states(self) -> tuple[StateTensor, ...]:
        return tuple(
            StateTensor(s, is_denominator=None) if isinstance(s, str) else s for s in self.state
        )

    def state_names(self, group: Group) -> tuple[str, ...]:
        """Keys of the state tensors of a group's parameters, in the function's order."""
        return tuple(s.name for s in self.states if s.when is None or s.when(group))

    def check_state_dtypes(self, group: Group, options: Options) -> None:
        """Refuse what a group's states cannot be kept in.

        Raises:
            ValueError: `state_dtype` asks for that.
        """
        kept = [state for state in self.states if state.name in self.state_names(group)]
        for state, param in product(kept, group["params"]):
            dtype = options.dtype_of(state.name, param)
            if dtype == EIGHT_BITS and state.is_exact:
                raise ValueError(
                    f"8 bits are not enough for the state {state.name!r}; ask for bfloat16, or "
                    "name the others in a dict"
                )
            if dtype == torch.float16 and state.is_denominator:
                raise ValueError(
                    f"float16 holds no squares of small gradients, which the state {state.name!r} "
                    "has; ask for bfloat16, or name the others in a dict"
                )
            if dtype in (EIGHT_BITS, torch.float16) and state.is_denominator is None:
                raise ValueError(
                    f"{dtype} for the state {state.name!r} of a rule that does not say whether it "
                    f"is divided by; give the Rule a StateTensor({state.name!r}, "
                    "is_denominator=...), or ask for bfloat16"
                )

    def active_flags(self, group: Group) -> frozenset[str]:
        return frozenset(name for name, is_set in self.flags.items() if is_set(group))

    def values(self, group: Group) -> Scalars:
        """The function's `hyper`: floats in double precision, or tensors of one element."""
        if callable(self.hyperparameters):
            return self.hyperparameters(group)
        return tuple(group[name] for name in self.hyperparameters)

    @property
    def counters(self) -> tuple[str, ...]:
        """Names of the state of one number a tensor."""
        return ("step", *(() if self.scalars is None else self.scalars.names))

    @property
    def step_columns(self) -> int:
        """What a kernel reads of each tensor: scalars that the function is given, and the step."""
        return 1 if self.scalars is None else self.scalars.reads + 1

    def reads_step_under(self, flags: frozenset[str]) -> bool:
        if isinstance(self.reads_step, bool):
            return self.reads_step or self.scalars is not None
        return not flags.isdisjoint(self.reads_step)

    @property
    def row_state(self) -> str | None:
        return None if self.row_wise is None else self.row_wise.state

    @property
    def row_function(self) -> Any:
        """The rule for rows."""
        return (self.row_wise and self.row_wise.function) or self.function

    def rows_read_step_under(self, flags: frozenset[str]) -> bool:
        return bool(self.row_wise and self.row_wise.reads_step) or self.reads_step_under(flags)

    def is_row_wise(self, grad: Tensor, state: State) -> bool:
        """Whether a parameter with this state is updated row by row."""
        if self.row_wise is None:
            return grad.layout == torch.sparse_coo
        return (
            self.row_wise.always
            or grad.layout == torch.sparse_coo
            or (self.row_wise.lazy is not None and self.row_wise.state in state)
        )

    def rows_unsupported(self, group: Group, options: Options) -> str | None:
        """Why rows of a group cannot be updated alone, or None."""
        if self.row_wise is None:
            return "its gradient is sparse"
        if len(self.state_names(group)) > MAX_ROW_STATES:
            return f"its rows have more states than {MAX_ROW_STATES}"
        return self.row_wise.unsupported(group, options)

    def has_state(self, state: State) -> bool:
        """Whether a parameter with this state has what the function updates."""
        if self.counts_step:
            return not state.keys() <= {REMAINDER}
        return any(state.get(item.name) is not None for item in self.states)

    def has_row_state(self, state: State) -> bool:
        """Whether a parameter with this state has one number a row."""
        rows = self.row_wise
        return rows is not None and rows.state is not None and (rows.always or rows.state in state)
