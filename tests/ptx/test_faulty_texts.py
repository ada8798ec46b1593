"""Faults of compilation, planted in the kernels' PTX: each is noticed, or changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import on_ptx
import pytest
import sanitizer
import torch
from cases import BLOCK
from embedding_tables import Tables, sparse
from faulty_texts import Mutant, survivors
from guarded_memory import guarded
from ptx_machine.access import Fault
from ptx_machine.grid import Launch
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import chunking

pytestmark = pytest.mark.ptx


def _dense(dtype: torch.dtype, state: torch.dtype) -> Callable[[], object]:
    """A step over two groups: a whole chunk and a long rest, and less than a thread has each."""
    params = [Parameter(guarded(torch.randn(n).to(dtype))) for n in (2 * BLOCK - 24, 48)]
    groups = [{"params": [param], "lr": 0.1 * (i + 1)} for i, param in enumerate(params)]
    optimizer = triton_optim.Adagrad(groups)
    for param in params:
        optimizer.state[param]["sum"] = guarded(torch.rand(param.shape).to(state))
        param.grad = torch.randn_like(param)
    return optimizer.step


def _norm() -> Callable[[], object]:
    params = [Parameter(guarded(torch.randn(n))) for n in (20 * BLOCK + 48, 7, 1)]
    for param in params:
        param.grad = torch.randn_like(param)
    return lambda: triton_optim.clip_grad_norm_(params, 1.0)


def _rows() -> Callable[[], object]:
    """Three tables in one launch; rows over several chunks of 128, that meet their borders."""
    tables = Tables([(40, 5), (9, 5), (3, 5)], torch.float32)
    optimizer = triton_optim.Adagrad(tables.params, lr=0.1)
    for param in tables.params:
        optimizer.state[param]["sum"] = guarded(torch.rand(param.shape))
    tables.new_gradients([705, 64, 1])
    first, long = tables.params[0], torch.tensor([0] * 128 + [1] * 129 + [2] * 300)
    ids = torch.cat([long, torch.randint(3, 40, (705 - len(long),))])
    first.grad = sparse(ids[torch.randperm(705)], tables.draw(705, 5), first)
    return optimizer.step


SCENARIOS: dict[str, tuple[str, Callable[[], Callable[[], object]]]] = {
    "float32": ("multi_tensor_kernel", lambda: _dense(torch.float32, torch.float32)),
    "bfloat16 and float32": ("multi_tensor_kernel", lambda: _dense(torch.bfloat16, torch.float32)),
    "norm": ("norm_kernel", _norm),
    "rows": ("rows_kernel", _rows),
}
BOUND, BARRIER, MASK = "bound off by one", "barrier dropped", "mask of a store dropped"
SAME_MAXIMUM = "all lanes that store hold the same number, after the shuffles"
WHOLE_LOAD = "grad = decode(tl.load(grad_ptr + block * BLOCK_SIZE + offsets), COMPUTE_DTYPE)"
WHOLE_CHUNK = "a chunk that is just whole goes where masks are: the same numbers"
# Faults that change no result: the fault and the statement, and why.
EQUIVALENT = {
    (BOUND, "if remaining >= CHUNK:"): WHOLE_CHUNK,
    (BOUND, "if remaining >= blocks * BLOCK_SIZE:"): WHOLE_CHUNK,
    (BOUND, "for block in tl.range(0, blocks):"): "a launch has more than one block a program",
    (BOUND, "for first in tl.range(0, n_programs, PARTIALS_BLOCK):"): (
        "where programs fill the last block, one more adds zeros"
    ),
    ("halves swapped", WHOLE_LOAD): ("a thread adds the squares of both, in either order"),
    (MASK, "standard.py"): SAME_MAXIMUM,
    (BOUND, "while low < high:"): "a search among one finds it once more",
    (BOUND, "for block in tl.range(start, stop, BLOCK_ROWS):"): (
        "a chunk without rows would run one block, of which all is masked"
    ),
    (BOUND, "for side in tl.range(0, 2):"): "it asks for start < stop, which are never equal here",
    (BOUND, "same = (row >= 1) & (tl.gather(key, tl.maximum(row - 1, 0), 0) == key)"): (
        "one more thread loads and stores a maximum, in a place that nothing reads"
    ),
    (BOUND, "tl.debug_barrier()  # all of this program's partial sums are stored"): (
        "one more thread loads and stores a sum, in a place that nothing reads"
    ),
    (BARRIER, "tl.debug_barrier()  # all of this program's partial sums are stored"): (
        "Triton puts a barrier of its own before the atomic"
    ),
    (BARRIER, "grad = tl.load(values_ptr + grad_offsets, mask=mask, other=0.0)"): (
        "what each thread stores after it, no other has loaded before"
    ),
    (BOUND, "carried = row_of(keys_ptr + last, base, last < stop, -1)"): "last is less than stop",
    (BOUND, "if carried == row_of(keys_ptr + last + 1, base, last + 1 < stop, -1):"): (
        "what the last block carries is not used"
    ),
    (BOUND, "for earliest in tl.range(begin, end + 1, BLOCK_ROWS):"): (
        "it begins before its end; one more block of partial sums is all masked"
    ),
    ("offset of one more", "standard.py"): (
        "a row of so few parts leaves the last warp's sums 0, and so is what takes their place"
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_is_noticed(name: str) -> None:
    kernel, prepare = SCENARIOS[name]
    step = prepare()
    found: list[tuple[int, list[Mutant]]] = []

    def try_all(launch: Launch) -> None:
        if launch.code.kernel.name == kernel and not found:
            found.append(survivors(launch))

    gpu = on_ptx.machine()
    gpu.before = try_all
    try:
        step()
    finally:
        gpu.before = None
    ((tried, left),) = found
    assert tried > 10
    assert not [mutant for mutant in left if (mutant.fault, mutant.statement) not in EQUIVALENT]


def test_a_false_promise_of_alignment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "is_aligned", lambda _: True)
    monkeypatch.setattr(sanitizer, "_check_alignment", lambda _: None)  # which would notice first
    param = Parameter(guarded(torch.randn(BLOCK + 4), offset=1))
    param.grad = torch.randn_like(param)
    with pytest.raises(Fault, match="misaligned load of 16 bytes"):
        triton_optim.SGD([param], lr=0.1).step()
