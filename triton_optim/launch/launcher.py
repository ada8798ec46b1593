"""One kernel launch: compiled and bound to its tables once, run at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import Rule
from . import backend, kernel_args
from .backend import COMPILED
from .kernel_args import Tables
from .tuning import Config
from .variant import Variant

if backend.DEVICE_TYPE:
    import triton
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import InterpreterError

    from ..kernels import multi_tensor


Grid = tuple[int, int, int]
MAX_PROGRAMS = 2**31 - 1
MAX_PROGRAMS_OF_DIM_1 = 65535  # CUDA's


class Launch:
    """A launch, compiled and bound to its tables when it is made.

    A compiled kernel is called directly: Triton's launcher would look it up by all its arguments.

    Args:
        kernel: of kernels/.
        variant: what it is compiled for.
        n_programs: how many; `grid`, a `checked_grid`, may be set before `run`.
        arguments: by name, constants among them. Of tensors, the address is what counts.
        options: the compiler's, by name.
        device: where it runs.
    """

    def __init__(
        self,
        kernel: Any,
        variant: object,
        n_programs: int,
        arguments: dict[str, Any],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.kernel, self.variant = kernel, variant
        self.grid = checked_grid(n_programs, 1)
        self.arguments, self.options, self.device = arguments, options, device
        self._start = self._bound()

    def _bound(self) -> Callable[[Mapping[str, Tensor | int]], object]:
        kernel = self.kernel
        if not COMPILED:
            return lambda changed: kernel[self.grid](**{**self.arguments, **changed})
        with backend.current(self.device):
            compiled = kernel.warmup(**self.arguments, **self.options, grid=self.grid)
            compiled[self.grid]  # loads it
        # Addresses: Triton would ask the driver whose memory a tensor's is, at every launch.
        values = [_address(self.arguments[name]) for name in kernel.arg_names]

        def run(changed: Mapping[str, Tensor | int]) -> None:
            now = values
            if changed:
                now = list(values)
                for name, value in changed.items():
                    now[kernel.arg_names.index(name)] = _address(value)
            _start(compiled, self.grid, now)

        return run

    @property
    def name(self) -> str:
        """The kernel's."""
        name: str = self.kernel.fn.__name__
        return name

    def run(self, **changed: Tensor | int) -> None:
        """Launch on the device's current stream, with these arguments in place of those bound."""
        with backend.current(self.device):
            self._start(changed)


class RuleLaunch(Launch):
    """One that runs a rule, which a user may have written.

    Raises:
        RuntimeError: the rule's function does not compile; interpreted, when it is run.
    """

    variant: Variant | Any
    _rule: Rule

    def _bound(self) -> Callable[[Mapping[str, Tensor | int]], object]:
        with self._explained():
            start = super()._bound()
        if COMPILED:
            return start

        def run(changed: Mapping[str, Tensor | int]) -> None:
            with self._explained():
                start(changed)

        return run

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what a rule's function is given, where it fails."""
        try:
            yield
        except (CompilationError, InterpreterError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            step = "step" if self.arguments["steps_ptr"] is not None else "step=None"
            raise RuntimeError(
                f"{self._rule.name} failed: {cause}\nIt is given param, grad, a tuple of "
                f"{self.variant.n_states} states, a tuple of {self.arguments['N_HYPERS']} "
                f"hyperparameters, {step} and FLAGS {sorted(self.variant.flags)}, and returns "
                "param and a tuple of as many states; see triton_optim.Rule."
            ) from error


class LaunchSpec(NamedTuple):
    """What one update launch updates, cut into programs."""

    variant: Variant
    config: Config
    block_to_tensor: Tensor  # int32, one a program: the row of its tensor
    n_bytes: int


class UpdateLaunch(RuleLaunch):
    """One update launch over all tensors of a variant, with tables on their device."""

    variant: Variant

    def __init__(self, rule: Rule, spec: LaunchSpec, tables: Tables) -> None:
        self.spec, self.tables, self._rule = spec, tables, rule
        variant, config, device = spec.variant, spec.config, tables.rows.device
        arguments = {
            "block_to_tensor_ptr": spec.block_to_tensor,
            "tensor_table_ptr": tables.rows,
            "format_table_ptr": tables.formats,
            "grads_ptr": tables.grads,
            "hyperparameters_ptr": tables.hypers,
            "steps_ptr": tables.steps,
            # Bound to a float32 scalar; `run` is given the step's own.
            "found_inf_ptr": tables.step_status,
            "grad_scale_ptr": tables.step_status,
            "grad_norm_ptr": tables.norm,
            "max_norm_ptr": tables.max_norm,
            "step_status_ptr": tables.step_status,
            "n_bytes": float(spec.n_bytes),
            **dict.fromkeys(kernel_args.unused_pointers(variant)),
            **kernel_args.constants(rule, variant, config, tables.hypers.shape[1]),
        }
        options = (
            kernel_args.options(variant, config, backend.architecture(device)) if COMPILED else {}
        )
        kernel = multi_tensor.multi_tensor_kernel
        super().__init__(kernel, variant, len(spec.block_to_tensor), arguments, options, device)


def checked_grid(x: int, y: int) -> Grid:
    """A grid of x times y programs.

    Raises:
        RuntimeError: a launch cannot have as many.
    """
    if x * y > MAX_PROGRAMS or y > MAX_PROGRAMS_OF_DIM_1:
        raise RuntimeError(
            f"a launch of {x} times {y} programs, where {MAX_PROGRAMS} and {MAX_PROGRAMS_OF_DIM_1} "
            "are the most; step the parameters in several optimizers"
        )
    return x, y, 1


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """The launches that are run meanwhile, for tools and tests."""
    launches: list[Launch] = []
    run = Launch.run

    def record(launch: Launch, **changed: Tensor | int) -> None:
        launches.append(launch)
        run(launch, **changed)

    Launch.run = record  # type: ignore[assignment, method-assign]
    try:
        yield launches
    finally:
        Launch.run = run  # type: ignore[method-assign]


def _start(compiled: Any, grid: Grid, arguments: Sequence[Any]) -> None:
    """What `compiled[grid](*arguments)` does, without 3 us for hooks where there are none."""
    hooks = getattr(getattr(triton, "knobs", None), "runtime", None)
    chain = getattr(hooks, "launch_enter_hook", None)
    if getattr(chain, "calls", True):
        compiled[grid](*arguments)
        return
    assert hooks is not None
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    metadata = (stream, compiled.function, compiled.packed_metadata, None)
    compiled.run(*grid, *metadata, chain, hooks.launch_exit_hook, *arguments)


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value
