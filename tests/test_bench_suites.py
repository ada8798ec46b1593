"""What the benchmark of steps measures: shapes, bytes, and whose optimizers can do what."""

from __future__ import annotations

import math

import pytest
from lab import suites
from lab.implementations import (
    IMPLEMENTATIONS,
    OURS,
    RULES,
    STORAGES,
    Implementation,
    Rule,
    bytes_per_param,
)
from lab.suites import Layout

FLOAT32, BFLOAT16, MIXED = STORAGES
SGD, MOMENTUM, ADAGRAD, RMSPROP, RMSPROP_CM = RULES


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


def test_what_peers_cannot_do_is_said() -> None:
    reasons = {item.name: item.refusal for item in IMPLEMENTATIONS}
    assert reasons[OURS](RMSPROP_CM, MIXED) is None
    assert reasons["torch fused"](RMSPROP, FLOAT32) == "torch has no fused RMSprop"
    assert "dtype" in (reasons["torch foreach"](ADAGRAD, MIXED) or "")
    assert "momentum" in (reasons["bitsandbytes"](RMSPROP_CM, FLOAT32) or "")
    assert "float32" in (reasons["bitsandbytes"](ADAGRAD, BFLOAT16) or "")
    assert reasons["optimi"](RMSPROP, FLOAT32) == "optimi has no RMSprop"
    (compiled,) = (item for item in IMPLEMENTATIONS if item.compiled)
    assert compiled.why_not(SGD, FLOAT32, 3219) == "more than 300 tensors"
    absent = Implementation("absent", "no-such-package", compiled.build, compiled.refusal)
    assert absent.why_not(SGD, FLOAT32, 1) == "no-such-package is not installed"
