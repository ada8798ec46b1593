"""Is an optimizer what its reference is: values, launches, bytes, and compiled kernels."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import backend
from ..launch.launcher import UpdateLaunch, record_launches
from ..launch.variant import Variant
from ..optimizer import FusedOptimizer
from ..storage import StorageOptions

# Storage of parameters, and of gradients; in float64 alone torch takes no mix.
STORAGES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
)
STEPS = 7  # RAdam's rule is another one from the sixth on
VECTOR_BITS = 128

Draw = Callable[..., Tensor]

CONTIGUOUS: tuple[Callable[[Draw], Tensor], ...] = (
    lambda draw: draw(),
    lambda draw: draw(0),
    lambda draw: draw(1),
    lambda draw: draw(7, 9),
    lambda draw: draw(4096),
    lambda draw: draw(5003),
)
TRANSPOSED_AND_MISALIGNED = (lambda draw: draw(12, 8).t(), lambda draw: draw(1001)[1:])
SHAPES = (*CONTIGUOUS, *TRANSPOSED_AND_MISALIGNED)


class Tensors:
    """Parameters and gradients: the same values in any dtype that holds those of `storages`.

    Args:
        storages: dtypes that round the values of parameters and of gradients.
        dtypes: in which they are.
        shapes: make them.
    """

    def __init__(
        self,
        storages: tuple[torch.dtype, torch.dtype],
        dtypes: tuple[torch.dtype, torch.dtype],
        shapes: Sequence[Callable[[Draw], Tensor]] = SHAPES,
    ) -> None:
        self._generator, self._shapes = torch.Generator().manual_seed(0), shapes
        self._grads = storages[1], dtypes[1]
        values = [shape(self._drawing(storages[0], dtypes[0])) for shape in shapes]
        self.params = [torch.nn.Parameter(value) for value in values]

    def _drawing(self, storage: torch.dtype, dtype: torch.dtype) -> Draw:
        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=self._generator).to(storage).to(dtype)
            return values.to(str(backend.DEVICE_TYPE))

        return draw

    def new_gradients(self, scale: float = 1.0) -> None:
        draw = self._drawing(*self._grads)
        for param, shape in zip(self.params, self._shapes, strict=True):
            grad = shape(draw).mul_(scale)
            param.grad = grad.to(param.dtype)
            param.grad.data = grad  # may be of another dtype, which torch refuses to assign

    def groups(self, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """Two, with rates of their own."""
        half = len(self.params) // 2
        second: dict[str, Any] = {"params": self.params[half:]}
        if "lr" in defaults:
            second["lr"] = defaults["lr"] / 2
        return [{"params": self.params[:half]}, second]


class Run(NamedTuple):
    """An optimizer after its steps."""

    tensors: Tensors
    optimizer: Any
    launches: list[Any]

    @property
    def values(self) -> Iterator[tuple[str, str, Tensor]]:
        """Parameters and state: of which kind, in words."""
        for i, param in enumerate(self.tensors.params):
            where = f"parameter {i} of shape {tuple(param.shape)}"
            yield "parameter", where, param.detach()
            state = self.optimizer.state.get(param, {})
            yield from (
                (f"state {name!r}", f"state {name!r} of {where}", value)
                for name, value in state.items()
                if isinstance(value, Tensor)
            )


class Errors(NamedTuple):
    """Of one tensor: what is right, and by how much ours and the reference's elements err."""

    kind: str
    where: str
    exact: Tensor
    ours: Tensor
    reference: Tensor


def check(optimizer_class: type[FusedOptimizer], *, compiled: bool = True, **kwargs: Any) -> None:
    """Check an optimizer against its reference, print a table, and raise if anything is wrong.

    The kernels run on a GPU, or on the CPU with `TRITON_INTERPRET=1` set before the import. They
    are compared with `fused=False`, which is `Rule.reference` or torch's class, in the same dtypes
    and in float64: parameters and state of odd shapes, in two groups, may err by no more than the
    reference does in any of them, and a unit in the last place. Then with clipping, under a
    `GradScaler` that skips a step, and after `state_dict()` and `load_state_dict()`. Last, kernels
    are compiled for sm_80, sm_90, sm_100 and gfx942: none may spill registers, and each loads 128
    bits at a time.

    Args:
        optimizer_class: of a module, since Triton reads its source.
        compiled: whether kernels are compiled, too, which takes some seconds.
        kwargs: arguments of the optimizer beside its parameters, without options of storage: what
            is stored differently is decoded before the rule and encoded after it.

    Raises:
        AssertionError: with every point that is wrong: which element, dtype and error.
        RuntimeError: no kernels run here, or the rule has no reference.
        ValueError: an option of storage.

    Example:
        >>> def test_lion() -> None:
        ...     triton_optim.testing.check(Lion, lr=1e-3, weight_decay=0.1)
    """
    if storage := [name for name in StorageOptions.__annotations__ if name in kwargs]:
        raise ValueError(
            f"check compares a rule with its reference, which takes no {', '.join(storage)}; leave "
            "it out: the rule computes the same numbers, which are stored in another way"
        )
    if backend.DEVICE_TYPE is None or (backend.COMPILED and not torch.cuda.is_available()):
        raise RuntimeError(
            "no kernel runs here; set TRITON_INTERPRET=1 before the import of triton_optim, or run "
            "this on a GPU"
        )
    if optimizer_class.rule.reference is None and optimizer_class._torch_class is None:
        raise RuntimeError(
            f"{optimizer_class.__name__} has nothing to be compared with; give its Rule a reference"
        )
    arguments = ", ".join(f"{name}={value}" for name, value in kwargs.items())
    print(f"{optimizer_class.__name__}({arguments}): largest error after {STEPS} steps")
    _print("parameters", "gradients", "error", "reference's", "launches/step", "bytes/element")
    wrong, variants = [], []
    for storages in STORAGES:
        ours = _run(optimizer_class, kwargs, storages)
        wrong.append(_check_values(optimizer_class, kwargs, storages, ours))
        update = ours.launches[-1]
        compiles = storages in (STORAGES[0], STORAGES[2]) and isinstance(update, UpdateLaunch)
        if compiled and compiles:
            variant = update.variant._replace(aligned=True)
            variants.append((variant, update.arguments["N_HYPERS"]))
    *narrow, double = wrong
    faults = [*chain(*wrong), *_check_clipping(optimizer_class, kwargs)]
    faults += _check_scaler(optimizer_class, kwargs)
    faults += _check_state_dict(optimizer_class, kwargs)
    if variants:
        faults += _check_compiled(optimizer_class, variants)
    print()
    if faults:
        if any(narrow) and not (double or optimizer_class.rule.doubles):
            faults.append("float32 scalars such as 1 - beta lose digits: see Rule's `doubles`")
        raise AssertionError("\n".join(faults))


def _reference(optimizer_class: type[FusedOptimizer]) -> Callable[..., Any]:
    """Makes one that steps in torch's operations, one tensor after another, at rates of float64."""
    loops = {"foreach": False} if optimizer_class._torch_class is not None else {}

    def make(params: Any, **kwargs: Any) -> Any:
        # Of tensors, torch would round what it computes to their dtype.
        kwargs = {name: _in_float64(value) for name, value in kwargs.items() if name != "sparse"}
        return optimizer_class(params, **{**kwargs, **loops, "fused": False})

    return make


def _in_float64(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_float64, value))
    return value.item() if isinstance(value, Tensor) else value


def _run(
    make: Callable[..., Any],
    kwargs: dict[str, Any],
    storages: tuple[torch.dtype, torch.dtype],
    dtype: torch.dtype | None = None,
) -> Run:
    tensors = Tensors(storages, storages if dtype is None else (dtype, dtype))
    defaults = make(tensors.params, **kwargs).defaults
    optimizer = make(tensors.groups(defaults), **kwargs)
    with record_launches() as launches:
        for _ in range(STEPS):
            tensors.new_gradients()
            optimizer.step()
    if dtype is None and not launches:
        raise AssertionError("no kernel was launched: every parameter fell back")
    return Run(tensors, optimizer, launches)


def _check_values(
    optimizer_class: type[FusedOptimizer],
    kwargs: dict[str, Any],
    storages: tuple[torch.dtype, torch.dtype],
    ours: Run,
) -> list[str]:
    reference = _reference(optimizer_class)
    theirs = _run(reference, kwargs, storages, storages[0])
    exact = _run(reference, kwargs, storages, torch.float64)
    errors = [*_errors(ours, theirs, exact)]
    worst = max(float(e.ours.max()) for e in errors)
    torch_worst = max(float(e.reference.max()) for e in errors)
    update = ours.launches[-1]
    moved = update.variant.bytes_per_element if isinstance(update, UpdateLaunch) else "by rows"
    _print(
        _name(storages[0]), _name(storages[1]), f"{worst:.2e}", f"{torch_worst:.2e}",
        f"{len(ours.launches) / STEPS:g}", str(moved),
    )  # fmt: skip
    how = ", clipped to a norm," if kwargs.get("max_grad_norm") is not None else ""
    return [*_worse(errors, storages[0], how)]


def _errors(ours: Run, theirs: Run, exact: Run) -> Iterator[Errors]:
    for (kind, where, value), (*_, their), (*_, right) in zip(
        ours.values, theirs.values, exact.values, strict=True
    ):
        if value.numel() and value.shape == right.shape:
            yield Errors(kind, where, right, _error(value, right), _error(their, right))


def _error(values: Tensor, exact: Tensor) -> Tensor:
    """NaN counts as infinitely wrong, but where both are."""
    values, exact = values.double(), exact.double()
    errors = (values - exact).abs().nan_to_num(math.inf, math.inf)
    return torch.where((values == exact) | (values.isnan() & exact.isnan()), 0.0, errors)


def _worse(errors: Iterable[Errors], storage: torch.dtype, how: str = "") -> Iterator[str]:
    """Where ours are larger than those of the reference in the same dtype."""
    # The two may round to either side; in float64 the reference is the measure, and errs itself.
    # A coefficient of gradients is rounded, and so is their product with it.
    units = 2 * STEPS if how or storage == torch.float64 else 1
    info, kinds = torch.finfo(storage), defaultdict[str, list[Errors]](list)
    for item in errors:
        kinds[item.kind].append(item)
    for alike in kinds.values():  # in one element alone the reference may err less by chance
        values = (item.exact.double().abs().nan_to_num(0.0, 0.0).max() for item in alike)
        their = max(float(item.reference.max()) for item in alike)
        slack = units * info.eps * max(info.smallest_normal, *map(float, values))
        for _, where, exact, error, _ in alike:
            if error.max() > their + slack:
                i = int(error.argmax())
                yield (
                    f"element {i} of {where} in {_name(storage)}{how} errs by {error.max():.2e}; "
                    f"it is {exact.flatten()[i]:.8g} by the reference in float64, which in "
                    f"{_name(storage)} errs by up to {their:.2e}"
                )


def _check_clipping(optimizer_class: type[FusedOptimizer], kwargs: dict[str, Any]) -> Iterator[str]:
    ours, *references = runs = _three(optimizer_class, kwargs)
    if "max_grad_norm" not in ours.optimizer._stepper.option_names:
        return
    ours.optimizer.max_grad_norm = 0.5
    for run in references:
        if run.optimizer.max_grad_norm is not None:
            run.optimizer.max_grad_norm = math.inf
    for _ in range(STEPS):
        for run in runs:
            run.tensors.new_gradients()
        for run in references:
            torch.nn.utils.clip_grad_norm_(run.tensors.params, 0.5)
        for run in runs:
            run.optimizer.step()
    yield from _worse(_errors(*runs), torch.float32, ", clipped to a norm,")


def _check_scaler(optimizer_class: type[FusedOptimizer], kwargs: dict[str, Any]) -> Iterator[str]:
    ours, *references = runs = _three(optimizer_class, {**kwargs, "fused": True})
    device = str(backend.DEVICE_TYPE)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    scaler.scale(torch.zeros((), device=device))  # makes its tensors
    for skips in (False, True, False):
        ours.tensors.new_gradients(scaler.get_scale())
        for run in references:
            run.tensors.new_gradients()
        if skips:
            ours.tensors.params[-1].grad.fill_(math.inf)  # type: ignore[union-attr]
        else:
            for run in references:
                run.optimizer.step()
        scaler.step(ours.optimizer)
        scaler.update()
    yield from _worse(_errors(*runs), torch.float32, ", under a GradScaler that skips a step,")


def _three(optimizer_class: type[FusedOptimizer], kwargs: dict[str, Any]) -> tuple[Run, Run, Run]:
    """Before a first step: an optimizer in float32, its reference, and that in float64."""
    reference = _reference(optimizer_class)
    double = (torch.float64, torch.float64)
    makes = ((optimizer_class, STORAGES[0]), (reference, STORAGES[0]), (reference, double))
    runs = []
    for make, dtypes in makes:
        # Row-wise optimizers have no kernels for transposed tensors.
        tensors = Tensors(STORAGES[0], dtypes, CONTIGUOUS)
        runs.append(Run(tensors, make(tensors.params, **kwargs), []))
    return runs[0], runs[1], runs[2]


def _check_state_dict(
    optimizer_class: type[FusedOptimizer], kwargs: dict[str, Any]
) -> Iterator[str]:
    straight, resumed = (_run(optimizer_class, kwargs, STORAGES[0]) for _ in range(2))
    other = optimizer_class(resumed.tensors.groups({}), **kwargs)
    other.load_state_dict(copy.deepcopy(resumed.optimizer.state_dict()))
    resumed = resumed._replace(optimizer=other)
    for run in (straight, resumed):
        run.tensors.new_gradients()
        run.optimizer.step()
    for (_, where, one), (*_, another) in zip(straight.values, resumed.values, strict=True):
        if not torch.equal(one, another):
            yield f"{where} is another after state_dict() and load_state_dict()"


def _check_compiled(
    optimizer_class: type[FusedOptimizer], variants: Sequence[tuple[Variant, int]]
) -> Iterator[str]:
    from .compiled import compile_updates

    print()
    _print("compiled for", "parameters", "registers", "spilled bytes", "bits an access")
    for row in compile_updates(optimizer_class, variants):
        registers, spills = row.usage
        _print(row.architecture, row.dtype, str(registers), str(spills), str(row.bits))
        if spills:
            yield f"for {row.dtype} on {row.architecture} a kernel spills {spills} bytes a thread"
        if row.bits < VECTOR_BITS:
            yield f"for {row.dtype} on {row.architecture} a kernel loads {row.bits} bits at a time"


def _print(*columns: str) -> None:
    print("  ".join(f"{column:<13}" for column in columns).rstrip())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
