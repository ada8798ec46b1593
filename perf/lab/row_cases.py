"""Which of the kernels that update by rows are audited: they are compiled for many widths."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from lab.row_kernels import Kernel, kernel_of

OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {}),
    ("Adagrad", {}),
    ("RMSprop", {"sparse": "lazy"}),
    ("RMSprop", {"sparse": "lazy", "centered": True}),
    ("RowwiseAdagrad", {}),
)
GATE = frozenset({"FOUND_INF", "UNSCALE"})  # under a GradScaler
# Powers of two are the elements of whole vectors; one less, and each is loaded alone.
WIDTHS = {
    torch.float32: (1, 4, 16, 64, 128, 256, 1024, 4096),
    torch.bfloat16: (1, 4, 16, 64, 128, 256, 1024, 4096),
    torch.float64: (1, 64, 2048),
}
ALONE = {torch.float32: (3, 63, 1023, 4095), torch.bfloat16: (63, 4095), torch.float64: (63,)}
CATCH_UP_WIDTHS = {torch.float32: (1, 64, 1024, 4096), torch.bfloat16: (64, 4096)}
MORE: dict[str, dict[str, Any]] = {
    "Adagrad": {"lr_decay": 0.5},
    "RowwiseAdagrad": {"decoupled_weight_decay": True},
}


def row_kernels() -> list[Kernel]:
    """All that are audited, from the optimizers that launch them."""
    found = {kernel.name: kernel for kernel in [Kernel("keys"), *_plain(), *_special()]}
    return [*found.values()]


def _plain() -> Iterator[Kernel]:
    by_row = OPTIMIZERS[2:]  # dense gradients too; those of others have another kernel
    for optimizers, widths, sparse in (
        (OPTIMIZERS, WIDTHS, True),
        (OPTIMIZERS, ALONE, True),
        (by_row, WIDTHS, False),
        (by_row, {torch.float32: ALONE[torch.float32][1::2]}, False),
    ):
        for (name, kwargs), dtype in product(optimizers, widths):
            for width in widths[dtype]:
                yield kernel_of(name, kwargs, (dtype,) * 3, width, sparse=sparse)
    for (name, kwargs), dtype in product(OPTIMIZERS[2:4], CATCH_UP_WIDTHS):
        for width in CATCH_UP_WIDTHS[dtype]:
            kernel = kernel_of(name, kwargs, (dtype,) * 3, width, sparse=False)
            assert kernel.variant is not None
            flags = kernel.variant.flags | {"CATCH_UP"}
            yield kernel._replace(variant=kernel.variant._replace(flags=flags))


def _special() -> Iterator[Kernel]:
    """Under a GradScaler; other dtypes, flags and numbers of elements together."""
    wide, half = (torch.float32,) * 3, (torch.bfloat16,) * 3
    for (name, kwargs), (dtypes, width) in product(
        OPTIMIZERS, ((wide, 64), (half, 64), (wide, 1024), (wide, 63))
    ):
        yield _with(kernel_of(name, kwargs, dtypes, width), conditions=GATE)
    for name, kwargs in OPTIMIZERS[2:]:
        yield _with(kernel_of(name, kwargs, wide, 64, sparse=False), conditions=GATE)
    mixed = ((*half[:2], torch.float32), (torch.float32, torch.bfloat16, torch.float32))
    for (name, kwargs), dtypes in product(OPTIMIZERS, mixed):
        yield kernel_of(name, kwargs, dtypes, 64)
    for width in (62, 60):
        yield kernel_of("Adagrad", {}, wide, width)
    yield kernel_of("Adagrad", {}, half, 60)
    for name, kwargs in MORE.items():
        yield kernel_of(name, kwargs, wide, 64)


def _with(kernel: Kernel, **changed: frozenset[str]) -> Kernel:
    assert kernel.variant is not None
    return kernel._replace(variant=kernel.variant._replace(**changed))  # type: ignore[arg-type]
