"""Random programs over lists of random tensors: after every step the same as torch's for-loop.

`HYPOTHESIS_PROFILE=soak` runs 5,000 programs instead of 100.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from typing import Any

import guarded_memory
import torch
from cases import DEVICE, double
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import GROUPS, Layout, Slot, decays, group_slots, indices, layouts, rates
from torch import Tensor
from torch.nn import Parameter

import triton_optim

settings.register_profile(
    "ci",
    max_examples=100,
    stateful_step_count=10,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "soak", settings.get_profile("ci"), max_examples=5000, derandomize=False, print_blob=True
)


class Programs(RuleBasedStateMachine):
    """Our optimizer over random tensors, and torch's for-loop over their doubles.

    After a comparison the doubles take our values, so that every step starts from the same.
    """

    @initialize(name=st.sampled_from(sorted(GROUPS)), seed=st.integers(0, 2**32), data=st.data())
    def start(self, name: str, seed: int, data: st.DataObject) -> None:
        self.name = name
        self.generator = torch.Generator().manual_seed(seed)
        self.saved: list[tuple[bytes, dict[str, Any]]] = []
        drawn = data.draw(st.lists(st.tuples(group_slots, GROUPS[name]), min_size=1, max_size=3))
        groups = [self._new_group(*group) for group in drawn]
        kwargs = {"initial_accumulator_value": 0.5} if name == "Adagrad" and seed % 2 else {}
        self.ours = getattr(triton_optim, name)([group for group, _ in groups], **kwargs)
        self.theirs = getattr(torch.optim, name)(
            [group for _, group in groups], foreach=False, **kwargs
        )
        self.new_gradients(without=set(), special=None, layout=None)

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=double(dtype))
        return values.to(dtype).to(DEVICE)

    def _new_group(
        self, new: list[Slot], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        values = [self._values(slot.shape, slot.dtype) for slot in new]
        ours = [Parameter(s.layout.copy(v)) for s, v in zip(new, values, strict=True)]
        theirs = [Parameter(v.to(double(v.dtype))) for v in values]
        return {"params": ours, **kwargs}, {"params": theirs, **kwargs}

    def _params(self, optimizer: torch.optim.Optimizer) -> list[Parameter]:
        return [param for group in optimizer.param_groups for param in group["params"]]

    def _pairs(self) -> list[tuple[Parameter, Parameter]]:
        return list(zip(self._params(self.ours), self._params(self.theirs), strict=True))

    def _pair(self, index: int) -> tuple[Parameter, Parameter]:
        pairs = self._pairs()
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
        for i, (p, q) in enumerate(self._pairs()):
            if i in without or not p.requires_grad:
                p.grad = q.grad = None
                continue
            values = self._values(p.shape, p.dtype)
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
            q.grad = values.to(q.dtype)

    @invariant()
    def step(self) -> None:
        """After every operation; with the gradients that are there."""
        self.ours.step()
        self.theirs.step()
        self.compare()
        for p, q in self._pairs():
            q.data.copy_(p.data)
            for key, value in self.theirs.state.get(q, {}).items():
                if value is not None:
                    value.copy_(self.ours.state[p][key])

    def compare(self) -> None:
        for p, q in self._pairs():
            _assert_close(p.detach(), q.detach())
            assert (p in self.ours.state) == (q in self.theirs.state)
            ours, theirs = self.ours.state.get(p, {}), self.theirs.state.get(q, {})
            assert list(ours) == list(theirs)
            for key, value in theirs.items():
                if value is not None:
                    _assert_close(ours[key], value)

    @rule(index=indices, frozen=st.booleans())
    def freeze_or_unfreeze(self, index: int, frozen: bool) -> None:
        for param in self._pair(index):
            param.requires_grad_(not frozen)

    @rule(index=indices)
    def drop_a_gradient(self, index: int) -> None:
        for param in self._pair(index):
            param.grad = None

    @rule()
    def clear_gradients_in_place(self) -> None:
        for optimizer in (self.ours, self.theirs):
            optimizer.zero_grad(set_to_none=False)

    @rule(index=indices, lr=rates, tensor=st.booleans())
    def change_lr(self, index: int, lr: float, tensor: bool) -> None:
        position = index % len(self.ours.param_groups)
        rate = torch.tensor(lr, dtype=torch.float64) if tensor else lr
        self.ours.param_groups[position]["lr"] = rate
        self.theirs.param_groups[position]["lr"] = lr

    @rule(index=indices, weight_decay=decays, maximize=st.booleans())
    def change_a_group(self, index: int, weight_decay: float, maximize: bool) -> None:
        for optimizer in (self.ours, self.theirs):
            group = optimizer.param_groups[index % len(optimizer.param_groups)]
            group.update(weight_decay=weight_decay, maximize=maximize)

    @precondition(lambda self: self.name == "SGD")
    @rule(index=indices, momentum=st.sampled_from([0.0, 0.5]))
    def change_momentum(self, index: int, momentum: float) -> None:
        for optimizer in (self.ours, self.theirs):
            group = optimizer.param_groups[index % len(optimizer.param_groups)]
            group.update(momentum=momentum, nesterov=False)

    @precondition(lambda self: len(self.ours.param_groups) < 4)
    @rule(new=group_slots, data=st.data())
    def add_a_group(self, new: list[Slot], data: st.DataObject) -> None:
        ours, theirs = self._new_group(new, data.draw(GROUPS[self.name]))
        self.ours.add_param_group(ours)
        self.theirs.add_param_group(theirs)
        self.saved.clear()

    @rule(index=indices, layout=layouts)
    def reassign_data(self, index: int, layout: Layout) -> None:
        p, q = self._pair(index)
        values = self._values(p.shape, p.dtype)
        p.data, q.data = layout.copy(values), values.to(q.dtype)

    @rule(layout=layouts)
    def move_state(self, layout: Layout) -> None:
        """Away and back by `.data`, as programs that offload do; memory order may change."""
        for state in self.ours.state.values():
            for value in state.values():
                if value is not None:
                    value.data = layout.copy(value.data)

    @precondition(lambda self: self.name != "Adagrad")
    @rule(index=indices)
    def forget_state(self, index: int) -> None:
        for optimizer, param in zip((self.ours, self.theirs), self._pair(index), strict=True):
            optimizer.state.pop(param, None)

    @rule()
    def save(self) -> None:
        file = io.BytesIO()
        torch.save(self.ours.state_dict(), file)
        self.saved.append((file.getvalue(), copy.deepcopy(self.theirs.state_dict())))

    @precondition(lambda self: self.saved)
    @rule()
    def load(self) -> None:
        ours, theirs = self.saved[-1]
        self.ours.load_state_dict(torch.load(io.BytesIO(ours), weights_only=True))
        self.theirs.load_state_dict(copy.deepcopy(theirs))
        self.compare()

    @rule()
    def load_into_torch_and_back(self) -> None:
        groups = [{"params": group["params"]} for group in self.ours.param_groups]
        other = getattr(torch.optim, self.name)(groups)
        other.load_state_dict(self.ours.state_dict())
        if all(p.dtype == torch.float64 for p in self._params(other)):
            other.step()
            self.theirs.step()
        self.ours.load_state_dict(copy.deepcopy(other.state_dict()))
        self.compare()

    @rule(pickled=st.booleans())
    def duplicate(self, pickled: bool) -> None:
        grads = [p.grad for p in self._params(self.ours)]
        self.ours = pickle.loads(pickle.dumps(self.ours)) if pickled else copy.deepcopy(self.ours)
        for param, grad in zip(self._params(self.ours), grads, strict=True):
            param.grad = grad
        self.compare()

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
        exact,
        rtol=info.eps,
        atol=8 * unit * largest + info.smallest_normal * info.eps,
        equal_nan=True,
    )


TestPrograms = Programs.TestCase
TestPrograms.settings = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
