"""Runs a program of perf/ over something tiny, with a stand-in for the GPU where there is none.

    python tests/helpers/tiny_programs.py bench_step --short --out DIR

Times are the host's, and say nothing.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

HAS_GPU = torch.cuda.is_available()
PROPERTIES = SimpleNamespace(
    name="stand-in", major=9, minor=0, multi_processor_count=1, total_memory=0, L2_cache_size=0,
    warp_size=32,
)  # fmt: skip


def _on_fake_device(module: Any) -> None:
    """One rule on a tiny layout, timed by the host's clock; nothing that torch would compile."""
    from fake_device import FakeDevice
    from lab import group
    from lab.embedding_tables import Tables
    from lab.suites import Layout
    from lab.workload import Workload

    from triton_optim.launch import backend

    tiny = Layout("tiny", [("weight", (12, 15))])
    tables = Tables(1000, 16, 100, "zipf")
    module.Device = FakeDevice
    module.RULES = module.RULES[1:2]
    module.LAYOUTS = (tiny,)
    vars(group)["RULES"] = module.RULES
    module.SUITES = {
        "sweep": lambda: [tiny],
        "gpt2": lambda: [tiny],
        "embeddings": lambda: [tables],
    }
    Workload.implementations = Workload.implementations[:3]
    if not HAS_GPU:
        vars(backend)["architecture"] = lambda _: "sm_90"


def _few_configs(module: Any) -> None:
    _on_fake_device(module)
    module.sizes = lambda default, _: [default]
    module.loops = lambda _: []


def _one_rule(module: Any) -> None:
    module.RULES = module.RULES[:1]


def _few_tensors(module: Any) -> None:
    module.COUNTS = (10,)
    module.RULES = {"sgd": module.RULES["sgd"]}
    module._print_first_step = lambda _: None


SMALLER = {
    "bench_step": _on_fake_device,
    "triton_optim.__main__": _one_rule,
    "tune": _few_configs,
    "bench_host": _few_tensors,
}
NEED_A_GPU = ("lab.machine", "bench_step", "tune")


def main() -> int | None:
    name = sys.argv.pop(1)
    if not HAS_GPU and name != "bench_host":  # which has a stand-in of its own
        os.environ["TRITON_INTERPRET"] = "1"
    module: Any = import_module(name)
    if name in SMALLER:
        SMALLER[name](module)
    if HAS_GPU or name not in NEED_A_GPU:
        return module.main()  # type: ignore[no-any-return]
    here = patch.object(torch.cuda, "is_available", lambda: True)
    with here, patch.object(torch.cuda, "get_device_properties", lambda _: PROPERTIES):
        return module.main()  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
