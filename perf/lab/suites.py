"""Lists of the shapes that models train, from their published dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lab.embedding_tables import EMBEDDING_SUITES, Tables
from lab.rules import Rule, Storage, bytes_kept, bytes_per_param

Tensors = list[tuple[str, tuple[int, ...]]]


class Layout(NamedTuple):
    """The parameters of one model, or of one point of a sweep."""

    name: str
    tensors: Tensors

    @property
    def params(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors)

    def size(self, rule: Rule, storage: Storage) -> int:
        """Bytes of parameters, gradients and state."""
        return self.params * bytes_kept(rule, storage)

    def state_bytes(self, rule: Rule, storage: Storage) -> int:
        """All but parameters and gradients."""
        return self.size(rule, storage) - 2 * self.params * storage.param.itemsize

    def columns(self, rule: Rule, storage: Storage) -> dict[str, Any]:
        """What a row says of these tensors."""
        step_bytes = self.params * bytes_per_param(rule, storage)
        return {"step_bytes": step_bytes, "model_bytes": self.size(rule, storage)}


def gpt2() -> Layout:
    """GPT-2 small, its head tied to its embedding.

    Radford et al., "Language models are unsupervised multitask learners", 2019, and the
    configuration `gpt2` of the released checkpoint: 124,439,808 parameters.
    """
    width, layers = 768, 12
    tensors: Tensors = [("wte", (50257, width)), ("wpe", (1024, width))]
    for i in range(layers):
        for name, out, size in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            tensors += [(f"h.{i}.{name}.weight", (size, out)), (f"h.{i}.{name}.bias", (out,))]
        tensors += _layer_norm(f"h.{i}.ln_1", width) + _layer_norm(f"h.{i}.ln_2", width)
    return Layout("gpt2", tensors + _layer_norm("ln_f", width))


def _layer_norm(name: str, width: int) -> Tensors:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def llama3_8b() -> Layout:
    """Llama 3 8B: 32 layers, grouped-query attention with 8 heads of keys and values.

    Grattafiori et al., "The Llama 3 herd of models", 2024: 8,030,261,248 parameters.
    """
    return _llama3("llama3-8b", width=4096, hidden=14336, layers=32)


def llama3_70b() -> Layout:
    """Llama 3 70B, of the same paper: 70,553,706,496 parameters."""
    return _llama3("llama3-70b", width=8192, hidden=28672, layers=80)


def _llama3(name: str, width: int, hidden: int, layers: int) -> Layout:
    layer = [*_attention(width, width, 1024), *_mlp("", width, hidden), *_norms(width)]
    return _decoder(name, 128256, width, layers, layer)


def moe() -> Layout:
    """OLMoE-1B-7B: 64 experts a layer, three matrices each, a tensor of its own for every one.

    Muennighoff et al., "OLMoE: Open mixture-of-experts language models", 2024: 6,919,161,856
    parameters in 3,219 tensors.
    """
    width = 2048
    heads: Tensors = [("q_norm", (width,)), ("k_norm", (width,))]
    layer = [*_attention(width, width, width), *heads, *_norms(width), *_experts(64, width, 1024)]
    return _decoder("moe", 50304, width, 16, layer)


def qwen3_30b_a3b() -> Layout:
    """Qwen3-30B-A3B: 128 experts a layer, three matrices each, a tensor of its own for every one.

    Yang et al., "Qwen3 technical report", 2025, and the configuration of the released checkpoint:
    30,532,122,624 parameters in 18,867 tensors.
    """
    width = 2048
    heads: Tensors = [("q_norm", (128,)), ("k_norm", (128,))]
    layer = [*_attention(width, 4096, 512), *heads, *_experts(128, width, 768), *_norms(width)]
    return _decoder("qwen3-30b-a3b", 151936, width, 48, layer)


def _decoder(name: str, vocabulary: int, width: int, layers: int, layer: Tensors) -> Layout:
    """Equal layers between an embedding and a head of its own."""
    tensors: Tensors = [("embed_tokens", (vocabulary, width))]
    tensors += [(f"{i}.{part}", shape) for i in range(layers) for part, shape in layer]
    return Layout(name, [*tensors, ("norm", (width,)), ("lm_head", (vocabulary, width))])


def _attention(width: int, queries: int, keys: int) -> Tensors:
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return [*((name, (size, width)) for name, size in sizes.items()), ("o_proj", (width, queries))]


def _norms(width: int) -> Tensors:
    return [("input_layernorm", (width,)), ("post_attention_layernorm", (width,))]


def _experts(n: int, width: int, hidden: int) -> Tensors:
    """The router of a layer, and its experts' matrices."""
    experts = [tensor for i in range(n) for tensor in _mlp(f"{i}.", width, hidden)]
    return [("gate", (n, width)), *experts]


def _mlp(prefix: str, width: int, hidden: int) -> Tensors:
    inner = [(f"{prefix}{name}_proj", (hidden, width)) for name in ("gate", "up")]
    return [*inner, (f"{prefix}down_proj", (width, hidden))]


def resnet50() -> Layout:
    """ResNet-50 for ImageNet.

    He et al., "Deep residual learning for image recognition", 2015, table 1, as in torchvision:
    25,557,032 parameters.
    """
    tensors = _convolution("conv1", 64, 3, 7)
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            tensors += _convolution(f"{name}.conv1", width, channels, 1)
            tensors += _convolution(f"{name}.conv2", width, width, 3)
            tensors += _convolution(f"{name}.conv3", 4 * width, width, 1)
            if block == 0:
                tensors += _convolution(f"{name}.downsample", 4 * width, channels, 1)
            channels = 4 * width
    return Layout("resnet50", [*tensors, ("fc.weight", (1000, channels)), ("fc.bias", (1000,))])


def _convolution(name: str, out: int, channels: int, size: int) -> Tensors:
    """A convolution without bias, and the weight and bias of its batch normalisation."""
    weight = (f"{name}.weight", (out, channels, size, size))
    return [weight, (f"{name}.bn.weight", (out,)), (f"{name}.bn.bias", (out,))]


# Rows of the 26 embedding tables of MLPerf's DLRM on Criteo Terabyte, hashed to at most 40,000,000.
DLRM_ROWS = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208,
    11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
DLRM_CAP = 4_000_000


def dlrm(cap: int = DLRM_CAP) -> Layout:
    """MLPerf's DLRM, with no table longer than `cap` rows.

    Naumov et al., "Deep learning recommendation model", 2019, with the sizes of MLPerf training
    0.7 to 2.1. Uncapped it has 24 billion parameters and, with gradients and momentum, 288 GB in
    float32: the five tables of 26 to 40 million rows are cut to 4 million. Gradients are dense.
    """
    width = 128
    tensors: Tensors = [
        (f"emb.{i}", (min(rows, cap), width)) for i, rows in enumerate(DLRM_ROWS)
    ]  # fmt: skip
    interactions = width + 27 * 26 // 2
    top = (interactions, 1024, 1024, 512, 256, 1)
    for name, sizes in (("bot", (13, 512, 256, width)), ("top", top)):
        for i, (size, out) in enumerate(pairwise(sizes)):
            tensors += [(f"{name}.{i}.weight", (out, size)), (f"{name}.{i}.bias", (out,))]
    return Layout("dlrm", tensors)


def shard(layout: Layout, ranks: int, rank: int = 0) -> Layout:
    """What FSDP2 leaves on one of so many ranks, of which rank 0 has no less than any other.

    `fully_shard` cuts every parameter along its first dimension as `torch.chunk` does; ranks for
    which no rows are left have an empty tensor.
    """
    tensors: Tensors = []
    for name, (rows, *others) in layout.tensors:
        chunk = -(-rows // ranks)
        tensors.append((name, (min(chunk, max(0, rows - rank * chunk)), *others)))
    return Layout(f"{layout.name}/{ranks}", tensors)


def sweep() -> list[Layout]:
    """From 1 tensor of 64 elements to 8 billion parameters, and 1,000 small tensors.

    Tensors have a billion elements at the most: some peers count them in 32 bits.
    """
    points = [(1, 1 << log) for log in (6, 10, 14, 18, 22, 25)]
    points += [(1000, 1024), (1, 100_000_000), (10, 100_000_000), (8, 1_000_000_000)]
    return [uniform(n, size) for n, size in points]


def uniform(n: int, size: int) -> Layout:
    """So many tensors of one size."""
    units = {f"{size // unit}{name}": size % unit for unit, name in ((10**9, "B"), (10**6, "M"))}
    short = next((short for short, rest in units.items() if not rest), f"{size}")
    return Layout(f"{n}x{short}", [(f"{i}", (size,)) for i in range(n)])


SMALL_TENSORS = "1000x1024"  # the point of the sweep with many small tensors
SHARDS = (8, 16, 32, 64, 128)  # ranks
SUITES: dict[str, Callable[[], Sequence[Layout | Tables]]] = {
    "sweep": sweep,
    "gpt2": lambda: [gpt2()],
    "many-tensors": lambda: [uniform(20_000, 1024)],
    "llama3-8b": lambda: [llama3_8b()],
    "llama3-8b-shards": lambda: [shard(llama3_8b(), ranks) for ranks in SHARDS],
    "resnet50": lambda: [resnet50()],
    "dlrm": lambda: [dlrm()],
    "moe": lambda: [moe()],
    **EMBEDDING_SUITES,
}
