"""What perf/audit_kernels.py compiles is what the package launches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


LAUNCHED = """
import re, sys, tempfile
sys.path[:0] = sys.argv[1:]
import torch
from torch.nn import Parameter
import triton_optim
from lab.disassembly import _run
from lab.dry_gpu import dry_gpu
from lab.row_code import instructions
from lab.row_kernels import Kernel, kernel_of
from triton_optim.kernels.keys import keys_kernel
from triton_optim.kernels.rows import rows_kernel

param = Parameter(torch.zeros(100, 64))
ids, values = torch.arange(9)[None], torch.ones(9, 64)
param.grad = torch.sparse_coo_tensor(ids, values, param.shape, check_invariants=True)
with dry_gpu("sm_90"):
    triton_optim.Adagrad([param]).step()
    kernel = kernel_of("Adagrad", {}, (torch.float32,) * 3, 64)
    for function, audited in ((rows_kernel, kernel), (keys_kernel, Kernel("keys"))):
        (launched,) = (k for c in function.device_caches.values() for k in c[0].values())
        assert launched.asm["cubin"] == audited.compiled("sm_90").asm["cubin"]
    binary = kernel.compiled("sm_90")

with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(binary.asm["cubin"])
    file.flush()
    listing = _run("nvdisasm", "-g", "-c", file.name)
machine, place = set(), ("", 0)
for line in listing.splitlines():
    if found := re.search(r'File "[^"]*/(\\w+[.]py)", line (\\d+)', line):
        place = (found[1], int(found[2]))
    elif found := re.search(r"(LDG|STG)[.]E(?:[.](64|128))?", line):
        way = "load" if found[1] == "LDG" else "store"
        machine.add((way, place, int(found[2] or 32)))
ptx = {(way, at[:2], bits) for way, at, bits in instructions(binary.asm["ptx"])}
vectors = {access for access in ptx if access[2] == 128}
assert len(vectors) > 4
assert vectors == {access for access in machine if access[2] == 128}
"""


def test_what_is_audited_is_what_is_launched() -> None:
    """To the bit; and its vectors are those of PTX, line by line."""
    command = [sys.executable, "-c", LAUNCHED, str(ROOT), str(ROOT / "perf")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
