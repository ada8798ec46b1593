"""The tensors that all implementations step in turn, and the check that they step them rightly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lab.device import Device
from lab.implementations import IMPLEMENTATIONS, Implementation, Step
from lab.mixed_copy import MixedCopy
from lab.reference import CHECKED_STEPS, Work
from lab.rows import MIXED_COPY
from lab.rules import Rule, Storage
from lab.suites import Layout

PROBED = 1024  # elements of a tensor that are checked: evenly spaced, first and last among them


class Workload(Work):
    """Parameters, gradients and state of one layout, which the implementations share.

    Sharing lets them all be ready at once where only one of them would fit the memory.
    """

    implementations: tuple[Implementation, ...] = IMPLEMENTATIONS

    def __init__(self, layout: Layout, rule: Rule, storage: Storage, device: str) -> None:
        self.layout, self.rule, self.storage, self.device = layout, rule, storage, device
        self._generator = torch.Generator(device).manual_seed(0)
        self.params: list[Parameter] = []
        self._states: list[dict[str, Tensor]] = []
        for _, shape in layout.tensors:
            values = torch.empty(shape, dtype=storage.param, device=device)
            self.params.append(Parameter(values.normal_(generator=self._generator)))
            self.params[-1].grad = torch.empty_like(values)
            names = () if storage.options else rule.states
            self._states.append({n: torch.zeros_like(values, dtype=storage.state) for n in names})
        self._places = {p.numel(): _places(p.numel(), device) for p in self.params}
        self.new_gradients()

    def tolerance(self, implementation: Implementation) -> float:
        """The largest error of one that is right."""
        return tolerance(self.storage)

    def copies(self, device: Device) -> dict[str, tuple[Step, int]]:
        """A copy with a step's reads and writes, and its bytes."""
        if self.storage.options:
            return {}
        mixed = MixedCopy(device.copied, self.rule, self.storage)
        mixed.tune(device)
        return {MIXED_COPY: (mixed.run, mixed.n_bytes)}

    def new_gradients(self) -> None:
        """Random ones, at the same addresses."""
        for grad in self._grads():
            grad.normal_(generator=self._generator)

    def renew(self, steps: Iterable[Step] = ()) -> None:
        """New random parameters and gradients, and state of zeros, at the same addresses.

        With one gradient for ever, centered RMSprop divides by the root of a rounding error: it
        ends in NaN, on which divisions and roots may take another time.
        """
        with torch.no_grad():
            for param in self.params:
                param.normal_(generator=self._generator)
        self.new_gradients()
        self._clear_state()

    def build(self, implementation: Implementation) -> Step:
        """An implementation's step over these tensors, from state of zeros."""
        kwargs = {**self.rule.kwargs, **dict(self.storage.options)}
        optimizer = implementation.build(self.rule._replace(kwargs=kwargs), self.params)
        if implementation.shares_state(self.storage):
            self._share_state(optimizer, self.device if implementation.step_on_gpu else "cpu")
        return _compiled(optimizer) if implementation.compiled else optimizer.step

    def _share_state(self, optimizer: Optimizer, step_device: str) -> None:
        for param, state in zip(self.params, self._states, strict=True):
            if state:
                count = {} if self.rule.optimizer == "SGD" else {"step": torch.zeros(())}
                steps = {name: step.to(step_device) for name, step in count.items()}
                optimizer.state[param] = {**steps, **state}
        self._clear_state()

    def _clear_state(self) -> None:
        for state in self._states:
            for tensor in state.values():
                tensor.zero_()

    def probe(self, tensors: Iterable[Tensor]) -> Tensor:
        """The checked elements of every tensor, as one float64 tensor."""
        places = self._places
        return torch.cat([t.detach().view(-1)[places[t.numel()]].double() for t in tensors])

    def probed(self, step: Step) -> list[Tensor]:
        return [self.probe(self.params)]

    def new_probed_gradients(self, step: Step, number: int) -> list[Tensor]:
        self.new_gradients()
        return [self.probe(self._grads())]

    def _grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]


def tolerance(storage: Storage) -> float:
    """The largest error that a right implementation makes in the checked steps.

    A step rounds a 16-bit parameter by up to half a unit; the other half is for 16-bit state and
    intermediates, which move an update by a few percent at the most. Stochastic rounding is off by
    up to a unit, and 8-bit state moves an update by up to an eighth. In float32 approximate roots
    and divisions may add a few units more: 8 a step.
    """
    units = 8 if storage.param == torch.float32 else 4 if storage.options else 1
    return CHECKED_STEPS * units * torch.finfo(storage.param).eps


def _places(numel: int, device: str) -> Tensor:
    count = min(numel, PROBED)
    return torch.arange(count, device=device) * (numel - 1) // max(1, count - 1)


def _compiled(optimizer: Optimizer) -> Step:
    """torch.compile of a step, as torch's tutorial on compiled optimizers does it.

    Rates stay Python floats, which favours it: they become constants of its kernels.
    """
    torch._dynamo.reset()  # it compiles one function a few times only, then runs it uncompiled

    @torch.compile(fullgraph=False)
    def step() -> None:
        optimizer.step()

    return step
