"""Memory that must not be touched, and memory beyond 2^31 elements.

Every other test is watched in the same way: see guarded_memory.py and sanitizer.py.
"""

from __future__ import annotations

import pytest
import torch
from cases import BLOCK, DEVICE, Case, every_state, interpreted
from guarded_memory import GuardedBuffer, guarded, guarded_buffers
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import chunking, kernel_args
from triton_optim.launch.kernel_args import Tables
from triton_optim.launch.launcher import Launch, LaunchSpec, UpdateLaunch
from triton_optim.launch.tuning import Config
from triton_optim.launch.variant import STORAGE_DTYPES, Variant
from triton_optim.optimizers.adagrad import RULE


@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1])
def test_nothing_beside_a_tensor_is_written(
    case: Case, numel: int, offset: int, dtype: torch.dtype
) -> None:
    """Parameter, gradient and state lie inside larger memory, at aligned and other addresses."""
    param = Parameter(guarded(torch.ones(numel, dtype=dtype, device=DEVICE), offset))
    param.grad = guarded(torch.ones_like(param), offset)
    optimizer = case.ours([param], fused=True)
    optimizer.step()
    for key, value in optimizer.state.get(param, {}).items():
        if key != "step":
            optimizer.state[param][key] = guarded(value, offset)
    optimizer.step()
    assert len(guarded_buffers) >= 2
    assert all(buffer.is_whole() for buffer in guarded_buffers)


def test_a_damaged_guard_is_seen() -> None:
    inside = guarded(torch.zeros(5, device=DEVICE), 1)
    assert inside.data_ptr() % 64 == 4
    buffer: GuardedBuffer = guarded_buffers[-1]
    assert buffer.is_whole()
    for outside in (-1, 5):
        torch.as_strided(inside, (1,), (1,), inside.storage_offset() + outside).fill_(1)
        assert not buffer.is_whole()
        buffer.memory[: buffer.start].fill_(0xA5)
        buffer.memory[buffer.stop :].fill_(0xA5)


def _step(monkeypatch: pytest.MonkeyPatch, programs: int, longer: int = 0) -> None:
    """A step over BLOCK + 1 elements with so many programs and so many more elements pretended."""
    row = kernel_args.row
    block_to_tensor = torch.zeros(programs, dtype=torch.int32)
    param = Parameter(torch.zeros(BLOCK + 1))
    param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(chunking, "assign_programs", lambda *_: block_to_tensor)
        patch.setattr(kernel_args, "row", lambda n, *args: row(n + longer, *args))
        triton_optim.SGD([param]).step()


@pytest.mark.interpreted
def test_the_sanitizer_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _step(monkeypatch, 2)
    with pytest.raises(AssertionError, match="not stored"):
        _step(monkeypatch, 1)
    for programs, longer in ((2, 1), (3, BLOCK)):
        with pytest.raises(Exception, match="out of bounds"):
            _step(monkeypatch, programs, longer)
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (run(launch), run(launch)))
    with pytest.raises(AssertionError, match="stored twice"):
        _step(monkeypatch, 2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beyond_two_to_the_31_elements(dtype: torch.dtype) -> None:
    """The far end of a pretended tensor: only its last blocks are real, and only they are named."""
    numel = 2**31 + BLOCK + 7
    first = 2**31 // BLOCK - 1
    real = numel - first * BLOCK
    memory = [torch.randn(real).to(dtype) for _ in range(3)]
    expected = [m.clone() for m in memory]
    addresses = [m.data_ptr() - first * BLOCK * dtype.itemsize for m in memory]
    name = STORAGE_DTYPES[dtype]
    variant = Variant(frozenset(), name, name, (name,), aligned=True, reads_step=False)
    tables = Tables(
        rows=torch.tensor(kernel_args.row(numel, 0, -first, [addresses[0], addresses[2]])),
        grads=torch.tensor([addresses[1]]),
        hypers=torch.tensor([[0.1, 0.0, 1e-10, 0.0]], dtype=torch.float64),
        steps=None,
    )
    memory[2].abs_()
    expected[2].abs_()
    block_to_tensor = torch.zeros(-(-real // BLOCK), dtype=torch.int32)
    spec = LaunchSpec(variant, Config(BLOCK, num_warps=1), block_to_tensor, 0)
    UpdateLaunch(RULE, spec, tables).run()
    param, grad, total = (m.double() for m in expected)
    total += grad * grad
    param -= 0.1 * grad / (total.sqrt() + 1e-10)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(memory[0].double(), param, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(memory[2].double(), total, rtol=tolerance, atol=tolerance)
