"""Our optimizer and a reference, led through the same random program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import guarded_memory
import torch
from cases import DEVICE, double
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lion import Lion, lion_reference
from strategies import GROUPS, Layout, Slot, group_slots, indices, layouts
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import triton_optim
from triton_optim.options import Group
from triton_optim.rule import State


def _lion_by_parts(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """Real and imaginary parts apart, as the kernels step them."""
    param, grad, exp_avg = (
        torch.view_as_real(t) if t.is_complex() else t for t in (param, grad, state["exp_avg"])
    )
    lion_reference(param, grad, {"exp_avg": exp_avg}, group)


class ComplexLion(Lion):
    """Takes complex parameters without kernels too."""

    rule = replace(Lion.rule, reference=_lion_by_parts)


class PairedPrograms(RuleBasedStateMachine):
    """Our optimizer over random tensors, and torch's for-loop over their doubles.

    Of Lion, which is no optimizer of torch's, its reference.

    After a comparison the doubles take our values, so that every step starts from the same.
    """

    @initialize(name=st.sampled_from(sorted(GROUPS)), seed=st.integers(0, 2**32), data=st.data())
    def start(self, name: str, seed: int, data: st.DataObject) -> None:
        self.name = name
        self.generator = torch.Generator().manual_seed(seed)
        self.saved: list[tuple[bytes, dict[str, Any]]] = []
        drawn = data.draw(st.lists(st.tuples(group_slots, GROUPS[name]), min_size=1, max_size=3))
        groups = [self.new_group(*group) for group in drawn]
        kwargs = {"initial_accumulator_value": 0.5} if name == "Adagrad" and seed % 2 else {}
        make: Any = ComplexLion if name == "Lion" else getattr(triton_optim, name)
        self.ours = make([group for group, _ in groups], **kwargs)
        self.theirs = self.reference([group for _, group in groups], **kwargs)
        self.new_gradients(without=set(), special=None, layout=None)

    def reference(self, groups: list[dict[str, Any]], **kwargs: Any) -> Any:
        if self.name == "Lion":
            return ComplexLion(groups, fused=False, **kwargs)
        return getattr(torch.optim, self.name)(groups, foreach=False, **kwargs)

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=double(dtype))
        return values.to(dtype).to(DEVICE)

    def new_group(
        self, new: list[Slot], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        values = [self.values(slot.shape, slot.dtype) for slot in new]
        ours = [Parameter(s.layout.copy(v)) for s, v in zip(new, values, strict=True)]
        theirs = [Parameter(v.to(double(v.dtype))) for v in values]
        return {"params": ours, **kwargs}, {"params": theirs, **kwargs}

    def params(self, optimizer: torch.optim.Optimizer) -> list[Parameter]:
        return [param for group in optimizer.param_groups for param in group["params"]]

    def pairs(self) -> list[tuple[Parameter, Parameter]]:
        return list(zip(self.params(self.ours), self.params(self.theirs), strict=True))

    def pair(self, index: int) -> tuple[Parameter, Parameter]:
        pairs = self.pairs()
        return pairs[index % len(pairs)]

    @rule(
        without=st.sets(indices, max_size=2),
        special=st.sampled_from([None, None, None, 0.0, float("inf"), float("nan")]),
        layout=layouts | st.none(),
    )
    def new_gradients(
        self, without: set[int], special: float | None, layout: Layout | None
    ) -> None:
        """Laid out in some way, or written where the old ones were."""
        for i, (p, q) in enumerate(self.pairs()):
            if i in without or not p.requires_grad:
                p.grad = q.grad = None
                continue
            values = self.values(p.shape, p.dtype)
            # Away from zero: where weight decay all but cancels a gradient, g / |g| magnifies
            # the rounding of either side.
            parts = torch.view_as_real(values) if values.is_complex() else values
            parts += parts.sign()
            # torch's complex weight decay carries NaN from one part of a number to the other
            if special is not None and not p.is_complex():
                values.view(-1)[:2] = special
            if layout is None and p.grad is not None:
                p.grad.copy_(values)
            else:
                p.grad = layout.copy(values) if layout else values
            q.grad = values.to(q.dtype, copy=True)

    @invariant()
    def step(self) -> None:
        """After every operation; with the gradients that are there."""
        self.ours.step()
        if self.ours.max_grad_norm is not None:
            self.clip()
        self.theirs.step()
        self.compare()
        for p, q in self.pairs():
            q.data.copy_(p.data)
            if p.grad is not None and q.grad is not None:  # clipped in place where p falls back
                q.grad.copy_(p.grad)
            for key, value in self.theirs.state.get(q, {}).items():
                if value is not None:
                    value.copy_(self.ours.state[p][key])

    def clip(self) -> None:
        """By our norm, which is summed in each gradient's arithmetic."""
        params, norm = self.params(self.theirs), self.ours.grad_norm.double()
        grads = [param.grad for param in params if param.grad is not None]
        exact = get_total_norm(grads).double()
        torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0, equal_nan=True)
        clip_grads_with_norm_(params, self.ours.max_grad_norm, norm)

    def compare(self) -> None:
        for p, q in self.pairs():
            _assert_close(p.detach(), q.detach())
            assert (p in self.ours.state) == (q in self.theirs.state)
            ours, theirs = self.ours.state.get(p, {}), self.theirs.state.get(q, {})
            assert list(ours) == list(theirs)
            for key, value in theirs.items():
                if value is not None:
                    _assert_close(ours[key], value)

    def teardown(self) -> None:
        broken = guarded_memory.pop_damaged()
        assert not broken


def _assert_close(ours: Tensor, exact: Tensor) -> None:
    """Rounded once to `ours`'s dtype, after a few operations in single or double precision."""
    assert ours.shape == exact.shape
    if ours.is_complex():
        ours, exact = torch.view_as_real(ours), torch.view_as_real(exact)
    info = torch.finfo(ours.dtype)
    largest = max([1.0, *exact[exact.isfinite()].abs().view(-1).tolist()])
    unit = torch.finfo(torch.float64 if info.bits == 64 else torch.float32).eps
    torch.testing.assert_close(
        ours.to(exact.dtype),
        exact.to(ours.device),
        rtol=info.eps,
        atol=8 * unit * largest + info.smallest_normal * info.eps,
        equal_nan=True,
    )
