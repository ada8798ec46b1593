"""Row-wise Adagrad beside FBGEMM's, on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import Parameter

from triton_optim import RowwiseAdagrad

pytestmark = pytest.mark.integration
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of parts that this build of it has not
    pytest.importorskip("fbgemm_gpu", reason="needs fbgemm-gpu-cpu", exc_type=ImportError)
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

ROWS, WIDTH, LR, EPS = 40, 8, 0.1, 1e-8


@pytest.mark.parametrize("fused", [None, False], ids=["kernels if they run", "without kernels"])
def test_weights_and_state_are_fbgemms(fused: bool | None) -> None:
    """Over five steps, with ids that occur once, several times and not at all.

    Without weight decay: the CPU kernels of FBGEMM 1.8.0 take it and do nothing with it.
    """
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )
    param = Parameter(torch.randn(ROWS, WIDTH))
    (weights,) = table.split_embedding_weights()
    weights.copy_(param.detach())
    optimizer = RowwiseAdagrad([param], lr=LR, eps=EPS, fused=fused)
    for _ in range(5):
        ids, values = torch.randint(0, ROWS, (30,)), torch.randn(30, WIDTH)
        table(ids, torch.arange(len(ids) + 1)).backward(values)  # which is a step
        param.grad = torch.sparse_coo_tensor(ids[None], values, param.shape)
        optimizer.step()
    torch.testing.assert_close(param.detach(), weights, rtol=2e-6, atol=2e-7)
    ((state, *_),) = table.split_optimizer_states()
    torch.testing.assert_close(optimizer.state[param]["sum"], state, rtol=2e-6, atol=2e-7)
