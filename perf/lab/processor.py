"""The processor of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """Its name, and how many threads torch takes of it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{models[0] if models else name}, {threads} thread{'s' * (threads > 1)}"
