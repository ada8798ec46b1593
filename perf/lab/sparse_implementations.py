"""Who steps embedding tables, by which rules, and what such a step must move."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import triton_optim
from lab.implementations import OURS, package_version
from lab.sparse_work import Candidate, Embeddings, Reference, Shape
from triton_optim.launch import backend

FBGEMM_PACKAGES = ("fbgemm-gpu", "fbgemm-gpu-cpu")
TORCH_SPARSE, TORCH_DENSE, FBGEMM = "torch sparse", "torch dense", "FBGEMM"


class Rule(NamedTuple):
    """An update rule, and what it keeps.

    `optimizer` is our class, and torch's where torch has it. `states` are of the table's size;
    `row_states` have a number a row.
    """

    name: str
    optimizer: str
    kwargs: dict[str, Any]
    states: int
    row_states: int

    def kept_bytes(self, shape: Shape) -> int:
        """Of the state of all tables."""
        return self.states * shape.table_bytes + 4 * self.row_states * shape.tables * shape.rows

    def step_bytes(self, shape: Shape, unique_rows: int) -> int:
        """What a step must move.

        Values read once; parameter and state of each touched row read once and written once. Not
        the ids, nor what it takes to sort them.
        """
        row = 4 * shape.dim * (1 + self.states) + 4 * self.row_states
        return shape.value_bytes + 2 * unique_rows * row


SGD = Rule("sgd", "SGD", {"lr": 0.01}, 0, 0)
ADAGRAD = Rule("adagrad", "Adagrad", {"lr": 0.1}, 1, 0)
ROWWISE = Rule("rowwise-adagrad", "RowwiseAdagrad", {"lr": 0.1}, 0, 1)
LAZY_RMSPROP = Rule("rmsprop-lazy", "RMSprop", {"lr": 0.01}, 1, 1)
RULES = (ADAGRAD, ROWWISE, LAZY_RMSPROP, SGD)


class RowwiseReference:
    """Row-wise Adagrad in plain torch: s += mean(g^2), p -= lr g / (sqrt(s) + eps), s one a row."""

    def __init__(self, params: list[Parameter], lr: float, eps: float = 1e-10) -> None:
        self._params, self._lr, self._eps = params, lr, eps
        self.sums = [param.new_zeros(len(param)) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        for param, sum in zip(self._params, self.sums, strict=True):
            assert param.grad is not None
            sum += param.grad.square().mean(1)
            param.sub_(self._lr * param.grad / (sum.sqrt() + self._eps)[:, None])


def reference(rule: Rule) -> Callable[[list[Parameter]], Reference]:
    """The rule over dense float64 gradients.

    A zero gradient moves no parameter under any of these rules, and RMSprop's state in the end is
    what zeros made of it: torch's dense optimizers are right for all of them.
    """
    if rule is ROWWISE:
        return lambda params: RowwiseReference(params, **rule.kwargs)
    make: Any = getattr(torch.optim, rule.optimizer)
    return lambda params: make(params, **rule.kwargs, foreach=False)


class Stepped:
    """An optimizer over the shared tables, which gets their sparse gradients."""

    def __init__(self, work: Embeddings, make: Callable[[list[Parameter]], Optimizer]) -> None:
        self.tables = work.tables
        self._work = work
        self._params = [Parameter(table) for table in work.tables]  # shares its memory
        self.step: Callable[[], object] = make(self._params).step

    def load(self, batch: int) -> None:
        for param, grad in zip(self._params, self._work.grads[batch], strict=True):
            param.grad = grad


class Densified(Stepped):
    """The same, but gets gradients of the table's size; that they are made is not in the step."""

    def __init__(self, work: Embeddings, make: Callable[[list[Parameter]], Optimizer]) -> None:
        super().__init__(work, make)
        self._filled = work.ids[0]
        for param in self._params:
            param.grad = torch.zeros_like(param)

    def load(self, batch: int) -> None:
        work, filled = self._work, self._filled
        self._filled = work.ids[batch]
        for param, old, ids, values in zip(
            self._params, filled, self._filled, work.values, strict=True
        ):
            assert param.grad is not None
            param.grad.index_fill_(0, old, 0).index_add_(0, ids, values)


class Fbgemm:
    """FBGEMM's own tables. Its backward pass is also its step, and is what is timed.

    A bag is one id, summed: on the CPU several times as fast as FBGEMM's tables without bags.
    """

    def __init__(self, work: Embeddings, kind: str, kwargs: dict[str, Any]) -> None:
        shape = work.shape
        with warnings.catch_warnings():  # of parts that a build of it lacks
            warnings.simplefilter("ignore")
            training = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
            common = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        on_gpu = work.tables[0].is_cuda
        location = common.EmbeddingLocation["DEVICE" if on_gpu else "HOST"]
        device = training.ComputeDevice["CUDA" if on_gpu else "CPU"]
        self._module = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(shape.rows, shape.dim, location, device)] * shape.tables,
            optimizer=training.OptimType[kind],
            learning_rate=kwargs["lr"],
            eps=1e-10,
            pooling_mode=common.PoolingMode.SUM,
        )
        self.tables: list[Tensor] = self._module.split_embedding_weights()
        for table, values in zip(self.tables, work.tables, strict=True):
            table.copy_(values)
        self._ids = [torch.cat(ids) for ids in work.ids]
        self._offsets = torch.arange(len(self._ids[0]) + 1, device=self._ids[0].device)
        self._work = work

    def load(self, batch: int) -> None:
        self._output: Tensor = self._module(self._ids[batch], self._offsets)
        self._grad = torch.cat(self._work.values, 1)

    def step(self) -> None:
        self._output.backward(self._grad, retain_graph=True)


class Implementation(NamedTuple):
    """Somebody's step by one rule.

    `tables` is how many times the size of the tables it keeps, state aside, and `passing` how
    many a step takes besides. `sums` says that it sums up a row's duplicates and then updates it.
    """

    rule: Rule
    name: str
    build: Callable[[Embeddings], Candidate]
    tables: int = 0
    passing: int = 0
    sums: bool = True

    @property
    def key(self) -> str:
        return f"{self.rule.name}, {self.name}"

    def kept_bytes(self, shape: Shape) -> int:
        """That it keeps, beside the tables that all share."""
        return self.tables * shape.table_bytes + self.rule.kept_bytes(shape)

    def version(self) -> str | None:
        """That is installed, or None."""
        packages = {OURS: (OURS,), FBGEMM: FBGEMM_PACKAGES}.get(self.name, ("torch",))
        return next(filter(None, map(package_version, packages)), None)


def _ours(rule: Rule) -> Callable[[Embeddings], Candidate]:
    extra = {"sparse": "lazy"} if rule is LAZY_RMSPROP else {}

    def build(work: Embeddings) -> Candidate:
        # The kernels or an error, where kernels run.
        fused = True if work.tables[0].device.type == backend.DEVICE_TYPE else None
        make: Any = getattr(triton_optim, rule.optimizer)
        return Stepped(work, lambda params: make(params, **rule.kwargs, **extra, fused=fused))

    return build


def _torch(rule: Rule, kind: type[Stepped]) -> Callable[[Embeddings], Candidate]:
    make: Any = getattr(torch.optim, rule.optimizer)
    return lambda work: kind(work, lambda params: make(params, **rule.kwargs))


def _fbgemm(rule: Rule, kind: str) -> Callable[[Embeddings], Candidate]:
    return lambda work: Fbgemm(work, kind, rule.kwargs)


# In the order in which they are given memory. torch's dense ones hold a gradient of the tables'
# size, and on a GPU, by default, two intermediates.
IMPLEMENTATIONS = (
    *(Implementation(rule, OURS, _ours(rule)) for rule in RULES),
    Implementation(ADAGRAD, TORCH_SPARSE, _torch(ADAGRAD, Stepped)),
    Implementation(SGD, TORCH_SPARSE, _torch(SGD, Stepped), sums=False),
    Implementation(ADAGRAD, FBGEMM, _fbgemm(ADAGRAD, "EXACT_ADAGRAD"), 1),
    Implementation(ROWWISE, FBGEMM, _fbgemm(ROWWISE, "EXACT_ROWWISE_ADAGRAD"), 1),
    Implementation(SGD, FBGEMM, _fbgemm(SGD, "EXACT_SGD"), 1),
    *(
        Implementation(rule, TORCH_DENSE, _torch(rule, Densified), 1, 2)
        for rule in (ADAGRAD, LAZY_RMSPROP)
    ),
)
