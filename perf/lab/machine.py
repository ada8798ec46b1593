"""What machine this is, as `name: value` lines, the last of which identifies it. Needs a GPU.

It imports nothing of triton_optim, so that it answers where that fails.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("triton", "numpy", "pytest", "hypothesis", "matplotlib", "tqdm", "expecttest", "build",
            "hatchling", "pytest-xdist", "bitsandbytes", "torch-optimi", "flashoptim",
            "fbgemm-gpu")  # fmt: skip
NO_GPU = "torch sees no GPU here"
NVIDIA_SMI = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def processor_and_threads() -> str:
    """The CPU, and how many threads torch takes of it."""
    import torch

    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def in_one_line() -> str:
    """The CPU, the GPU and the versions."""
    import torch
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    return f"{processor_and_threads()}, {device}, {versions}, Python {platform.python_version()}"


def printed(*command: str) -> str:
    """What a program prints, or "unknown" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().replace("\n", "; ")


def package_version(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Print the machine; 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    gpu = torch.cuda.get_device_properties(0)
    facts = {
        "GPU": gpu.name,
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory": f"{gpu.total_memory / 2**30:.1f} GiB",
        "L2": f"{gpu.L2_cache_size / 2**20:.1f} MiB",
        "nvidia-smi": printed("nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv"),
        "CPU": f"{processor()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda}",
        **{package: package_version(package) or "not installed" for package in PACKAGES},
        "commit": printed("git", "describe", "--always", "--dirty"),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"machine: {gpu.name}, torch {torch.__version__}, Triton {facts['triton']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
