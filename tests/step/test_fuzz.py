"""Random programs over lists of random tensors: after every step the same as torch's for-loop.

`HYPOTHESIS_PROFILE=soak` runs 5,000 programs instead of 60.
"""

from __future__ import annotations

import copy
import io
import os
import pickle

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from paired_programs import PairedPrograms
from strategies import GROUPS, Layout, Slot, decays, group_slots, indices, layouts, rates

settings.register_profile(
    "ci",
    max_examples=60,
    stateful_step_count=10,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "soak", settings.get_profile("ci"), max_examples=5000, derandomize=False, print_blob=True
)


class Programs(PairedPrograms):
    """What programs do between steps."""

    @rule(index=indices, frozen=st.booleans())
    def freeze_or_unfreeze(self, index: int, frozen: bool) -> None:
        for param in self.pair(index):
            param.requires_grad_(not frozen)

    @rule(index=indices)
    def drop_a_gradient(self, index: int) -> None:
        for param in self.pair(index):
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
            group["weight_decay"] = weight_decay
            if "maximize" in group:
                group["maximize"] = maximize

    @rule(max_norm=st.sampled_from([None, 0.5, 5.0]))
    def change_max_grad_norm(self, max_norm: float | None) -> None:
        self.ours.max_grad_norm = max_norm

    @precondition(lambda self: self.name == "SGD")
    @rule(index=indices, momentum=st.sampled_from([0.0, 0.5]))
    def change_momentum(self, index: int, momentum: float) -> None:
        for optimizer in (self.ours, self.theirs):
            group = optimizer.param_groups[index % len(optimizer.param_groups)]
            group.update(momentum=momentum, nesterov=False)

    @precondition(lambda self: len(self.ours.param_groups) < 4)
    @rule(new=group_slots, data=st.data())
    def add_a_group(self, new: list[Slot], data: st.DataObject) -> None:
        ours, theirs = self.new_group(new, data.draw(GROUPS[self.name]))
        self.ours.add_param_group(ours)
        self.theirs.add_param_group(theirs)
        self.saved.clear()

    @rule(index=indices, layout=layouts)
    def reassign_data(self, index: int, layout: Layout) -> None:
        p, q = self.pair(index)
        values = self.values(p.shape, p.dtype)
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
        for optimizer, param in zip((self.ours, self.theirs), self.pair(index), strict=True):
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
    def load_into_the_reference_and_back(self) -> None:
        groups = [{"params": group["params"]} for group in self.ours.param_groups]
        other = self.reference(groups)
        other.load_state_dict(self.ours.state_dict())
        if all(p.dtype == torch.float64 for p in self.params(other)):
            other.step()
            self.theirs.step()
        self.ours.load_state_dict(copy.deepcopy(other.state_dict()))
        self.take_scalars(other)
        self.compare()

    def take_scalars(self, other: torch.optim.Optimizer) -> None:
        """Which torch's `load_state_dict` rounds to the parameter's dtype; ours does not."""
        scalars = self.ours.rule.scalars
        for p, q in zip(self.params(other), self.params(self.theirs), strict=True):
            for key in scalars.names if scalars else ():
                if key in self.theirs.state.get(q, {}):
                    self.theirs.state[q][key].copy_(other.state[p][key])

    @rule(pickled=st.booleans())
    def duplicate(self, pickled: bool) -> None:
        grads = [p.grad for p in self.params(self.ours)]
        self.ours = pickle.loads(pickle.dumps(self.ours)) if pickled else copy.deepcopy(self.ours)
        for param, grad in zip(self.params(self.ours), grads, strict=True):
            param.grad = grad
        self.compare()


TestPrograms = Programs.TestCase
TestPrograms.settings = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
