"""The copy with the reads and writes of a step: its streams, its bytes, and its machine code.

As a script, in a process where Triton compiles, it prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from fake_device import FakeDevice
from lab.copy_kernel import mixed_copy_kernel
from lab.mixed_copy import CONFIGS, MixedCopy
from lab.rules import RULES, STORAGES, Rule, Storage, bytes_per_param
from lab.traffic import Traffic, watched

ROOT = Path(__file__).parents[2]
SGD, MOMENTUM, *_, RMSPROP_CM, ADAMW = RULES
MIXES = [
    *product((SGD,), STORAGES[:2]),  # which has no state
    *product((MOMENTUM, RMSPROP_CM), STORAGES),
]
MEMORY = 150_000 // 4  # float32: a block of the largest mix, and some


@pytest.mark.parametrize(("rule", "storage"), MIXES, ids=lambda value: value.name)
def test_every_stream_is_read_and_all_but_the_gradient_written(
    rule: Rule, storage: Storage
) -> None:
    mix = MixedCopy(torch.randn(MEMORY, device=DEVICE), rule, storage)
    for stream in mix.streams:
        assert 0.9 < float(stream.float().std()) < 1.1
        stream.random_(-64, 64)  # whose sums bfloat16 has
    assert len(mix.param) == len(mix.grad) == mix.n_bytes / bytes_per_param(rule, storage)
    assert (0 if mix.states is None else len(mix.states)) == len(rule.states)
    assert (mix.param.dtype, mix.grad.dtype) == (storage.param, storage.param)
    param, grad = mix.param.clone(), mix.grad.clone()
    states = None if mix.states is None else mix.states.clone()
    mix.run()
    assert torch.equal(mix.grad, grad)
    assert torch.equal(mix.param, param + grad)
    if mix.states is not None and states is not None:
        assert mix.states.dtype == storage.state
        assert torch.equal(mix.states, states + grad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what interpreted kernels move")
@pytest.mark.parametrize(("rule", "storage"), MIXES, ids=lambda value: value.name)
def test_a_run_moves_a_steps_bytes(rule: Rule, storage: Storage) -> None:
    mix = MixedCopy(torch.randn(MEMORY, device=DEVICE), rule, storage)
    for mix.config in CONFIGS:
        traffic = Traffic()
        with watched(traffic.count):
            mix.run()
        assert traffic.loaded + traffic.stored == mix.n_bytes
        assert traffic.loaded - traffic.stored == mix.grad.nbytes


def test_the_fastest_config_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = MixedCopy(torch.randn(MEMORY, device=DEVICE), SGD, STORAGES[0])
    times = dict(zip(CONFIGS, (3.0, 2.0, 1.0, 5.0), strict=True))
    device = FakeDevice()
    monkeypatch.setattr(mix, "run", lambda: None)
    monkeypatch.setattr(device, "between", lambda *_: times[mix.config])
    mix.tune(device)
    assert mix.config == CONFIGS[2]


def main() -> None:
    from lab.disassembly import disassembled
    from lab.dry_gpu import dry_gpu

    found, compiled = [], []
    with dry_gpu("sm_90") as gpu:
        for rule, storage in MIXES:
            mix = MixedCopy(torch.empty(MEMORY), rule, storage)
            for mix.config in CONFIGS:
                mixed_copy_kernel.device_caches.clear()
                mix.run()
                ((kernels, *_),) = mixed_copy_kernel.device_caches.values()
                (kernel,) = kernels.values()
                compiled.append(kernel)
                found.append({"programs": gpu.launches[-1][0], "elements": len(mix.param)})
    for row, (code, usage) in zip(found, disassembled("sm_90", compiled), strict=True):
        row["spills"] = usage.spills
        row["accesses"] = [i.n_bytes for i in code if i.access]
    print(json.dumps(found))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a pretended GPU is given")
def test_compiled_for_a_gpu_its_loads_and_stores_are_whole_vectors() -> None:
    """Every thread moves the same, so that accesses times threads are the bytes of a step."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "perf"), str(ROOT / "tests/helpers")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, __file__]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    kernels = zip(product(MIXES, CONFIGS), json.loads(done.stdout), strict=True)
    for ((rule, storage), (block, warps)), kernel in kernels:
        assert kernel["spills"] == 0
        assert kernel["programs"] * block == kernel["elements"]
        assert {*kernel["accesses"]} == {16}, (rule, storage, block, warps)
        assert 32 * warps * sum(kernel["accesses"]) == block * bytes_per_param(rule, storage)


if __name__ == "__main__":
    main()
