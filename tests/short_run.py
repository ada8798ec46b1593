"""A few steps of every state layout over tensors of every kind, for compute-sanitizer."""

import torch
from cases import STATEFUL_CASES, Tensors

for case in STATEFUL_CASES:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = Tensors(dtype)
        tensors.train(case.ours(tensors.params), 2)
torch.cuda.synchronize()
