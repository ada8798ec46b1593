"""State in 8 bits, outside of steps: the codes and exponents of kernels/float8.py."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZE = 256
_INFINITE, _ROOM, _LOWEST, _HIGHEST = 0x7F800000, (3 << 20) - 1, 32, 253


def encode(values: Tensor, *, is_denominator: bool) -> tuple[Tensor, Tensor]:
    """Codes of float32 values, to nearest, and exponents of their groups.

    Args:
        values: dense in memory, any shape.
        is_denominator: E5M3 instead of E4M3.

    Returns:
        uint8, laid out as `values`, and uint8 [groups], in memory order.
    """
    flat = in_memory_order(values.float())
    n_groups = -(-len(flat) // GROUP_SIZE)
    bits = torch.nn.functional.pad(flat, (0, n_groups * GROUP_SIZE - len(flat))).view(torch.int32)
    bits = bits.view(n_groups, GROUP_SIZE)
    size = bits & 0x7FFFFFFF
    exponents = (size.where(size < _INFINITE, 0).amax(1, keepdim=True) + _ROOM) >> 23
    exponents = exponents.clamp(_LOWEST, 255 if is_denominator else _HIGHEST)
    if is_denominator:
        code = ((size - ((exponents - 31) << 23)).clamp(min=0) + (1 << 19)) >> 20
        code = code.clamp(max=0xFE).masked_fill(size > _INFINITE, 0xFF)
    else:
        inverse = ((254 - exponents) << 23).view(torch.float32)
        scaled = size.view(torch.float32) * inverse * 2.0**-112
        code = ((scaled.view(torch.int32) + (1 << 19)) >> 20).clamp(max=0x7D)
        code = code.masked_fill(size == _INFINITE, 0x7E).masked_fill(size > _INFINITE, 0x7F)
        code |= (bits >> 24) & 0x80
    codes = torch.empty_like(values, dtype=torch.uint8)
    in_memory_order(codes).copy_(code.flatten()[: len(flat)])
    return codes, (exponents.flatten() - _LOWEST).to(torch.uint8)


def decode(codes: Tensor, exponents: Tensor, *, is_denominator: bool) -> Tensor:
    """bfloat16 of codes, exactly, laid out as they are."""
    code = in_memory_order(codes).int()
    exponent = exponents.int().repeat_interleave(GROUP_SIZE)[: len(code)] + _LOWEST
    if is_denominator:
        finite = ((code << 20) + ((exponent - 31) << 23)).view(torch.float32)
        special, sign = code >= 0xFE, torch.zeros_like(code)
    else:
        sign = (code & 0x80) << 24
        scale = (exponent << 23).view(torch.float32)
        finite = (((code & 0x7F) << 20) | sign).view(torch.float32) * 2.0**112 * scale
        special = (code & 0x7F) >= 0x7E
    infinite = ((_INFINITE + ((code & 1) << 22)) | sign).view(torch.float32)
    values = torch.empty_like(codes, dtype=torch.bfloat16)
    in_memory_order(values).copy_(torch.where(special, infinite, finite))
    return values


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory: [elements]."""
    return tensor.as_strided((tensor.numel(),), (1,))
