"""Who steps embedding tables, and how."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import triton_optim
from lab.implementations import Implementation, Step
from lab.rows import OURS, TORCH_DENSE, TORCH_SPARSE
from lab.rules import LAZY_RMSPROP, ROWWISE, SGD, Rule, Storage
from triton_optim.launch import backend

if TYPE_CHECKING:
    from lab.embeddings import Embeddings

FBGEMM = "FBGEMM"


class Candidate:
    """Somebody's step of embedding tables: what is checked and timed.

    Attributes:
        tables: that it steps.
        step: of the gradients that were loaded last.
    """

    tables: Sequence[Tensor]
    step: Step

    def load(self, batch: int) -> None:
        """Make this batch's gradients those of the next steps."""
        raise NotImplementedError

    def __call__(self) -> object:
        return self.step()


class Stepped(Candidate):
    """An optimizer over the shared tables, which gets their sparse gradients."""

    def __init__(self, work: Embeddings, make: Callable[[list[Parameter]], Optimizer]) -> None:
        self.tables, self._work = work.tables, work
        self._params = [Parameter(table) for table in work.tables]  # shares its memory
        self.step = make(self._params).step

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


class Fbgemm(Candidate):
    """FBGEMM's own tables. Its backward pass is also its step, and is what is timed.

    A bag is one id, summed: on the CPU several times as fast as FBGEMM's tables without bags.
    """

    KINDS: ClassVar = {
        "adagrad": "EXACT_ADAGRAD",
        "rowwise-adagrad": "EXACT_ROWWISE_ADAGRAD",
        "sgd": "EXACT_SGD",
    }

    def __init__(self, rule: Rule, work: Embeddings) -> None:
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
            optimizer=training.OptimType[self.KINDS[rule.name]],
            learning_rate=rule.kwargs["lr"],
            eps=1e-10,
            pooling_mode=common.PoolingMode.SUM,
        )
        self.tables = self._module.split_embedding_weights()
        for table, values in zip(self.tables, work.tables, strict=True):
            table.copy_(values)
        self._ids = [torch.cat(ids) for ids in work.ids]
        self._offsets = torch.arange(len(self._ids[0]) + 1, device=self._ids[0].device)
        self._work, self.step = work, self._backward

    def load(self, batch: int) -> None:
        self._output: Tensor = self._module(self._ids[batch], self._offsets)
        self._grad = torch.cat(self._work.values, 1)

    def _backward(self) -> None:
        self._output.backward(self._grad, retain_graph=True)


def _ours(rule: Rule, work: Embeddings) -> Candidate:
    extra = {"sparse": "lazy"} if rule is LAZY_RMSPROP else {}
    # The kernels or an error, where kernels run.
    fused = True if work.tables[0].device.type == backend.DEVICE_TYPE else None
    make: Any = getattr(triton_optim, rule.optimizer)
    return Stepped(work, lambda params: make(params, **rule.kwargs, **extra, fused=fused))


def _torch(kind: type[Stepped]) -> Callable[[Rule, Embeddings], Candidate]:
    def build(rule: Rule, work: Embeddings) -> Candidate:
        make: Any = getattr(torch.optim, rule.optimizer)
        return kind(work, lambda params: make(params, **rule.kwargs))

    return build


def _embedding(
    name: str, package: str, build: Callable[..., Candidate], refused: dict[str, str], **extra: Any
) -> Implementation:
    """With the reasons why rules are refused, by name."""

    def refusal(rule: Rule, _: Storage) -> str | None:
        return refused.get(rule.name)

    return Implementation(name, package, build, refusal, torch_state=False, **extra)


_NO_ROWWISE = {ROWWISE.name: "torch has no row-wise Adagrad"}
# In the order in which they are given memory. torch's dense ones hold a gradient of the tables'
# size, and on a GPU, by default, two intermediates.
EMBEDDING_IMPLEMENTATIONS = (
    _embedding(OURS, OURS, _ours, {}),
    _embedding(
        TORCH_SPARSE, "torch", _torch(Stepped),
        {**_NO_ROWWISE, LAZY_RMSPROP.name: "torch's RMSprop refuses sparse gradients"},
        one_by_one=(SGD.name,),
    ),
    _embedding(
        FBGEMM, "fbgemm-gpu fbgemm-gpu-cpu", Fbgemm,
        {LAZY_RMSPROP.name: "FBGEMM has no lazy RMSprop"}, tables=1,
    ),
    _embedding(
        TORCH_DENSE, "torch", _torch(Densified),
        {**_NO_ROWWISE, SGD.name: "torch's sparse SGD stands for it"}, tables=1, passing=2,
    ),
)  # fmt: skip
