"""What the benchmark of steps measures: shapes, bytes, and whose optimizers can do what."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lab import suites
from lab.gpus import peak_bandwidth
from lab.implementations import IMPLEMENTATIONS, Implementation
from lab.rows import OURS
from lab.rules import FORMATS, RULES, STORAGES, Rule, bytes_per_param
from lab.suites import Layout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

FLOAT32, BFLOAT16, MIXED = STORAGES
SGD, MOMENTUM, ADAGRAD, RMSPROP, RMSPROP_CM, ADAMW = RULES


@pytest.mark.parametrize(
    ("layout", "tensors", "params"),
    [
        (suites.gpt2(), 148, 124_439_808),
        (suites.llama3_8b(), 291, 8_030_261_248),
        (suites.llama3_70b(), 723, 70_553_706_496),
        (suites.qwen3_30b_a3b(), 18_867, 30_532_122_624),
        (suites.resnet50(), 161, 25_557_032),
        (suites.moe(), 3219, 6_919_161_856),
        (suites.dlrm(cap=40_000_000), 42, 187_767_399 * 128 + 2_368_897),
        (suites.dlrm(), 42, 24_063_992 * 128 + 2_368_897),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_layouts_have_the_published_sizes(layout: Layout, tensors: int, params: int) -> None:
    assert len(layout.tensors) == tensors
    assert layout.params == params
    assert len({name for name, _ in layout.tensors}) == tensors


def test_the_sweep_is_from_64_elements_to_8_billion_parameters() -> None:
    layouts = suites.sweep()
    sizes = [layout.params for layout in layouts if layout.name != suites.SMALL_TENSORS]
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (64, 8_000_000_000)
    (small,) = (layout for layout in layouts if layout.name == suites.SMALL_TENSORS)
    assert len(small.tensors) == 1000
    largest = max(math.prod(shape) for layout in layouts for _, shape in layout.tensors)
    assert largest < 2**31


@pytest.mark.parametrize(
    ("rule", "floors"),
    [
        (SGD, (12, 6, 6)),
        (MOMENTUM, (20, 10, 14)),
        (ADAGRAD, (20, 10, 14)),
        (RMSPROP, (20, 10, 14)),
        (RMSPROP_CM, (36, 18, 30)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_that_a_step_must_move(rule: Rule, floors: tuple[int, ...]) -> None:
    assert tuple(bytes_per_param(rule, storage) for storage in STORAGES) == floors


def test_bytes_of_formats() -> None:
    """A remainder of 16 bits is read and written, as the parameter is."""
    adamw = RULES[5]
    assert [bytes_per_param(adamw, storage) for storage in FORMATS] == [26, 18, 14, 14]
    assert [bytes_per_param(ADAGRAD, storage) for storage in FORMATS] == [18, 14, 10, 12]


def test_what_peers_cannot_do_is_said() -> None:
    reasons = {item.name: item.refusal for item in IMPLEMENTATIONS}
    assert reasons[OURS](RMSPROP_CM, MIXED) is None
    assert reasons["torch fused"](RMSPROP, FLOAT32) == "torch has no fused RMSprop"
    assert "dtype" in (reasons["torch foreach"](ADAGRAD, MIXED) or "")
    assert "momentum" in (reasons["bitsandbytes"](RMSPROP_CM, FLOAT32) or "")
    assert "float32" in (reasons["bitsandbytes"](ADAGRAD, BFLOAT16) or "")
    for_loop = IMPLEMENTATIONS[1]
    assert for_loop.why_not(ADAGRAD, FORMATS[2], 1) == "torch has no such storage"
    assert reasons["optimi"](RMSPROP, FLOAT32) == "optimi has no RMSprop"
    assert reasons["apex"](ADAGRAD, FLOAT32) is reasons["apex"](SGD, FLOAT32) is None
    assert reasons["apex"](RMSPROP, FLOAT32) == "apex has no RMSprop"
    assert "without a word" in (reasons["apex"](MOMENTUM, BFLOAT16) or "")
    assert "raises" in (reasons["apex"](ADAGRAD, BFLOAT16) or "")
    assert "dtype" in (reasons["apex"](ADAGRAD, MIXED) or "")
    assert reasons["apex"](ADAMW, MIXED) is reasons["apex"](ADAMW, FLOAT32) is None
    assert "float32" in (reasons["apex"](ADAMW, BFLOAT16) or "")
    engine = reasons["TransformerEngine"]
    assert engine(MOMENTUM, FLOAT32) is engine(ADAMW, MIXED) is None
    assert engine(ADAGRAD, FLOAT32) == "TransformerEngine has no Adagrad"
    assert "without a word" in (engine(SGD, BFLOAT16) or "")
    assert reasons["HeavyBall"](SGD, FLOAT32) is reasons["HeavyBall"](MOMENTUM, MIXED) is None
    assert "bias" in (reasons["HeavyBall"](RMSPROP_CM, FLOAT32) or "")
    assert reasons["HeavyBall"](ADAGRAD, FLOAT32) == "HeavyBall has no Adagrad"
    assert "float32" in (reasons["HeavyBall"](MOMENTUM, BFLOAT16) or "")
    (compiled,) = (item for item in IMPLEMENTATIONS if item.compiled)
    assert compiled.why_not(SGD, FLOAT32, 3219) == "more than 300 tensors"
    absent = Implementation("absent", "no-such-package", compiled.build, compiled.refusal)
    assert absent.why_not(SGD, FLOAT32, 1) == "no-such-package is not installed"


@pytest.mark.parametrize(
    ("name", "clock_khz", "bus_bits", "expected"),
    [
        ("NVIDIA H200", 3_201_000, 6144, 4.8e12),  # the datasheet's
        ("NVIDIA H100 80GB HBM3", 2_619_000, 5120, 3_352_320_000_000),
        ("NVIDIA A100-SXM4-40GB", 1_215_000, 5120, 1_555_200_000_000),
        ("AMD Instinct MI300X", 0, 0, 5.3e12),
        ("some GPU", 0, 0, None),
    ],
)
def test_peak_bandwidth(name: str, clock_khz: int, bus_bits: int, expected: float | None) -> None:
    assert peak_bandwidth(name, clock_khz, bus_bits) == expected


def _shapes(layout: Layout) -> list[tuple[int, ...]]:
    return [shape for _, shape in layout.tensors]


class _Parameters(torch.nn.Module):
    """The parameters of a layout, on the meta device."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        for i, shape in enumerate(_shapes(layout)):
            self.register_parameter(f"p{i}", Parameter(torch.empty(shape, device="meta")))


@pytest.mark.parametrize(("ranks", "rank"), [(8, 0), (8, 7), (128, 0), (128, 126), (128, 127)])
def test_shards_are_those_of_fsdp2(ranks: int, rank: int) -> None:
    """Also of a model whose first dimensions no number of ranks divides, or are smaller."""
    uneven = Layout("uneven", [("a", (50257, 3)), ("b", (1000,)), ("c", (5, 2, 2)), ("d", (1,))])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        for layout in (suites.llama3_8b(), uneven):
            model = _Parameters(layout)
            fully_shard(model, mesh=mesh)
            local = [tuple(p.to_local().shape) for p in model.parameters()]  # type: ignore[attr-defined]
            assert local == _shapes(suites.shard(layout, ranks, rank))
    finally:
        dist.destroy_process_group()


def test_shards_of_llama_are_even() -> None:
    whole = suites.llama3_8b().params
    shards = suites.SUITES["llama3-8b-shards"]()
    assert [layout.name for layout in shards] == [f"llama3-8b/{n}" for n in (8, 16, 32, 64, 128)]
    assert [whole / layout.params for layout in shards] == [8, 16, 32, 64, 128]


def test_twenty_thousand_tensors() -> None:
    (layout,) = suites.SUITES["many-tensors"]()
    assert len(layout.tensors) == 20_000


def _fake(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> list[dict[str, Any]]:
    """Puts a class into a module that is not installed; returns what it is called with."""
    calls: list[dict[str, Any]] = []
    fake = ModuleType(module)
    setattr(fake, name, lambda params, **kwargs: calls.append(kwargs))
    monkeypatch.setitem(sys.modules, module, fake)
    parent, _, _ = module.partition(".")
    monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
    return calls


def test_how_packages_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As their signatures are in the versions that lab/implementations.py names."""
    builds = {item.name: item.build for item in IMPLEMENTATIONS}
    sgd = _fake(monkeypatch, "apex.optimizers", "FusedSGD")
    builds["apex"](MOMENTUM, [])
    assert sgd == [{"lr": 0.1, "momentum": 0.9}]
    adagrad = _fake(monkeypatch, "apex.optimizers", "FusedAdagrad")
    builds["apex"](ADAGRAD, [])
    assert adagrad == [{"lr": 0.1}]
    engine = _fake(monkeypatch, "transformer_engine.pytorch.optimizers", "FusedSGD")
    builds["TransformerEngine"](SGD, [])
    assert engine == [{"lr": 0.1}]
    heavyball = _fake(monkeypatch, "heavyball", "SGD")
    for rule in (SGD, MOMENTUM):
        builds["HeavyBall"](rule, [])
    assert heavyball == [{"lr": 0.1, "beta": beta, "consume_grad": False} for beta in (0.0, 0.9)]
