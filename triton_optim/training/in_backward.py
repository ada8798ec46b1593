"""Steps parameters during the backward pass, as soon as their gradients are complete."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..optimizer import FusedOptimizer
from ..step.validation import describe
from .grad_buckets import GradBucket, ParamIndex, assign_buckets

# Little beside a large model, in few launches: 209 for 7 billion bfloat16 parameters.
BUCKET_BYTES = 64 * 2**20

# Wrappers that exchange gradients after the hooks on parameters have run.
_WRAPPERS = ("DistributedDataParallel", "DDP", "FullyShardedDataParallel")


def step_in_backward(
    model: nn.Module, optimizer: FusedOptimizer, *, bucket_bytes: int = BUCKET_BYTES
) -> StepInBackward:
    """Step each parameter in `backward()`, once its gradient is complete, and free that.

    The parameters get the bits that `optimizer.step(); optimizer.zero_grad()` would give them after
    `backward()`, but no more than some `bucket_bytes` of gradients and the largest one are there at
    a time. Parameters are cut into buckets, in reverse order of `model.parameters()`. A bucket
    steps, in a launch for each set of flags, when the last of its gradients has come, or at the end
    of the pass if some do not come.

    The optimizer keeps state, groups and rates: schedulers, `state_dict()` and `load_state_dict()`
    work between passes as ever. `optimizer.step()` finds no gradients then and may stay in the
    program: step post hooks run there and nowhere else.

    Args:
        model: what is called and run backward; it holds all parameters of `optimizer`, and may hold
            others. Call `fully_shard` on it before.
        optimizer: SGD, Adagrad or RMSprop of this package.
        bucket_bytes: of gradients that a bucket holds at most. A larger parameter is its own
            bucket; at 0 each one is. There are buckets for each device and dtype, and for
            parameters that are frozen now.

    Returns:
        A handle: `remove()`, or leaving it as a context manager, ends it.

    Raises:
        TypeError: the optimizer is not of this package, or its class or the instance has another
            `step()`.
        ValueError: `bucket_bytes` is negative.
        RuntimeError: a parameter is not in the model, or is stepped in backward already; the model
            is wrapped by DistributedDataParallel, which exchanges gradients later; the optimizer
            clips or has step pre hooks, which would need all gradients at once. Nothing has changed
            then.

    Limits:
        Every backward pass is a step: gradients are not accumulated over passes, not clipped by
        their global norm, and not scaled by a `GradScaler`, which would see them too late. A pass
        with `retain_graph=True` is a step too, and another one through that graph fails where it
        needs a parameter's value of before. After an exception inside backward some buckets have
        stepped; gradients that waited are dropped. After `add_param_group` the next pass raises:
        `remove()` and register again. A module that several reentrant checkpoints use raises too.

    Example:
        >>> optimizer = RMSprop(model.parameters(), lr=1e-3)
        >>> step_in_backward(model, optimizer)
        >>> for batch in loader:
        ...     loss(model, batch).backward()
    """
    if bucket_bytes < 0:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; give it 0 or more")
    _check_optimizer(optimizer)
    for module in model.modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                raise _wrapped(base.__name__)
    places = _places(optimizer)
    _check_params(model, optimizer, places)
    return StepInBackward(model, optimizer, places, bucket_bytes)


class StepInBackward:
    """What `step_in_backward` returns: hooks, and the buckets that they fill."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        places: dict[int, list[ParamIndex]],
        bucket_bytes: int,
    ) -> None:
        optimizer._stepper.drop_plan(optimizer._fused_view())  # its tables would only take memory
        self._optimizer = optimizer
        self._ids = [*map(id, optimizer._fused_view().params)]
        # What the autograd engine will call at the end of the pass that is under way.
        self._end: weakref.ref[partial[None]] | None = None
        expected = [param for param in reversed([*model.parameters()]) if id(param) in places]
        self._buckets = [
            GradBucket(optimizer, chain.from_iterable(places[id(param)] for param in params))
            for params in assign_buckets(expected, bucket_bytes)
        ]
        # It keeps this alive. A parameter must not: torch hides its hooks from garbage collection.
        self._handles = [model.register_forward_hook(_Watch(self))]
        this = weakref.ref(self)
        for bucket in self._buckets:
            for index, param in enumerate(bucket.params):
                hook = _Hook(_grad_ready, this, weakref.ref(bucket), index)
                self._handles.append(_register(param, hook))

    def remove(self) -> None:
        """End it. Gradients that wait in a pass under way stay, for `optimizer.step()`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._buckets = [], []

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, _: object = None) -> None:
        if self._end is not None:
            return
        end = partial(self._finish)
        self._end = weakref.ref(end, self._abandon)
        # Behind other callbacks, which may bring the last gradients: fully_shard's does.
        queue = Variable._execution_engine.queue_callback
        queue(partial(queue, end))
        _check_optimizer(self._optimizer)
        params = [*self._optimizer._fused_view().params]
        if [*map(id, params)] != self._ids or not all(map(_is_hooked, params)):
            raise RuntimeError(
                "the optimizer's parameters are not those of the call of step_in_backward(); call "
                "remove() on what it returned, and step_in_backward() again"
            )
        for bucket in self._buckets:
            bucket.begin()

    def _finish(self) -> None:
        for bucket in self._buckets:
            bucket.finish()
        self._end = None

    def _abandon(self, end: object) -> None:
        """The engine dropped a pass before its end: there was an exception."""
        if end is self._end:
            self.abandon_unfinished()

    def abandon_unfinished(self) -> None:
        """Drop a pass that is under way, outside of any: the engine's thread may do so later."""
        if self._end is not None:
            self._end = None
            for param in self._optimizer._fused_view().params:
                param.grad = None


class _Watch:
    """Lets a model's own pass be the first to begin, before those of reentrant checkpoints."""

    def __init__(self, stepper: StepInBackward | None = None) -> None:
        self._stepper = stepper

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        if self._stepper is None or torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() < 0:
            self._stepper.abandon_unfinished()
        # What wraps a model cannot be seen from it before.
        wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None and any(module is model for module in wrapper.modules()):
            raise _wrapped(type(wrapper).__name__)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(self._stepper._begin)

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()  # nothing steps a copy of the model


class _Hook(partial[None]):
    """One of ours, among the hooks of a parameter."""


def _grad_ready(
    stepper_ref: weakref.ref[StepInBackward],
    bucket_ref: weakref.ref[GradBucket],
    index: int,
    param: Tensor,
) -> None:
    """A gradient is complete."""
    stepper, bucket = stepper_ref(), bucket_ref()
    if stepper is None or bucket is None:
        raise RuntimeError(
            "the model given to step_in_backward() is gone, but one of its parameters is trained; "
            "keep the model, or what step_in_backward() returned"
        )
    if stepper._end is None:
        stepper._begin()
    bucket.grad_ready(index)


def _is_hooked(param: Tensor) -> bool:
    return any(isinstance(h, _Hook) for h in (param._post_accumulate_grad_hooks or {}).values())


def _register(param: Tensor, hook: _Hook) -> RemovableHandle:
    """Also on a frozen parameter, which torch refuses: it may be trained later."""
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_()
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
    if frozen:
        param.requires_grad_(False)
    return handle


def _places(optimizer: FusedOptimizer) -> dict[int, list[ParamIndex]]:
    """Where each parameter stands, by its id."""
    places: dict[int, list[ParamIndex]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            places.setdefault(id(param), []).append((index, position))
    return places


def _check_optimizer(optimizer: FusedOptimizer) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} cannot step in backward; "
            "use an optimizer of triton_optim"
        )
    if optimizer._is_overridden():
        raise TypeError(
            f"{type(optimizer).__name__} has another step(), of its class or put on the instance, "
            "which would not be called; leave it out, or call optimizer.step() after backward"
        )
    if optimizer.max_grad_norm is not None:
        raise RuntimeError(
            "clipping by max_grad_norm needs all gradients at once; leave it out, or call "
            "optimizer.step() after backward"
        )
    if optimizer._stepper.options.sparse is not None:
        raise RuntimeError(
            "sparse='lazy' makes good what rows missed with the alpha of all steps since, of which "
            "buckets know their own; call optimizer.step() after backward"
        )
    if optimizer._optimizer_step_pre_hooks:
        raise RuntimeError(
            "a step pre hook of the optimizer would find no gradients; remove it, and put what it "
            "does into Tensor.register_hook"
        )


def _check_params(
    model: nn.Module, optimizer: FusedOptimizer, places: dict[int, list[ParamIndex]]
) -> None:
    held = {*map(id, model.parameters())}
    for (index, position), *_ in places.values():
        group = optimizer.param_groups[index]
        where, param = describe(group, index, position), group["params"][position]
        if id(param) not in held:
            raise RuntimeError(
                f"{where} is not in the model; give step_in_backward() the model that holds all of "
                "the optimizer's parameters, or give this one an optimizer of its own"
            )
        if _is_hooked(param):
            raise RuntimeError(
                f"{where} is stepped in backward already; call remove() on what "
                "step_in_backward() returned for it"
            )


def _wrapped(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} exchanges gradients after they would have been used; shard the model with "
        "torch.distributed.fsdp.fully_shard, or call optimizer.step() after backward"
    )
