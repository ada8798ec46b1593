"""The byte-level language models of the main job, and the text that they read."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
LAYERS = 2


class GRU(nn.Module):
    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.gru = nn.GRU(size, size, bias=False, batch_first=True)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size, bias=False) for _ in range(2))
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(size, 4 * size, bias=False), nn.GELU(), nn.Linear(4 * size, size, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        output: Tensor = x + self.mlp(self.norms[1](x))
        return output


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, size: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.position = nn.Embedding(context, size)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(size, bias=False)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def make_model(name: str, vocabulary: int, size: int, context: int) -> nn.Module:
    if name == "gru":
        return GRU(vocabulary, size)
    return Transformer(vocabulary, size, context)


class Text(NamedTuple):
    """A text as indices into the bytes that occur in it."""

    tokens: Tensor
    vocabulary: int
    entropy: float  # of a byte by its frequency alone, in nats

    @classmethod
    def of(cls, content: bytes) -> Text:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        occurring, tokens, counts = data.unique(return_inverse=True, return_counts=True)
        frequency = counts.double() / len(data)
        return cls(tokens, len(occurring), -(frequency * frequency.log()).sum().item())


def documentation() -> bytes:
    return "".join(topics[name] for name in sorted(topics)).encode()
