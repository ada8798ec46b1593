"""The kernels that update by rows: compiled as `RowLaunch` would, and their code read.

They are compiled for many widths, of which some are audited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.nn import Parameter

import triton_optim
from lab.audit import VECTOR_BITS, Measures
from lab.compiled import built_in, rule_and_flags, short
from lab.control_flow import Instruction
from lab.gpus import GPUS
from lab.row_code import Loop, adjacent, main_loop, row_accesses
from triton_optim.kernels.keys import keys_kernel
from triton_optim.kernels.rows import rows_kernel
from triton_optim.launch import backend, row_chunking, row_launcher
from triton_optim.launch.chunking import GradSignature, PlannedParam
from triton_optim.launch.row_launcher import RowVariant
from triton_optim.launch.tuning import RowConfig
from triton_optim.testing.compiled import Usage, compile_for

KEYS_WARPS = 4  # KeysLaunch's

Optimizer = tuple[str, dict[str, Any]]
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient and state
OPTIMIZERS: tuple[Optimizer, ...] = (
    ("SGD", {}),
    ("Adagrad", {}),
    ("RMSprop", {"sparse": "lazy"}),
    ("RMSprop", {"sparse": "lazy", "centered": True}),
    ("RowwiseAdagrad", {}),
)
BY_ROW = OPTIMIZERS[2:]  # for dense gradients too; those of others have another kernel
MORE: tuple[Optimizer, ...] = (
    ("Adagrad", {"lr_decay": 0.5}),
    ("RowwiseAdagrad", {"decoupled_weight_decay": True}),
)
GATE = frozenset({"FOUND_INF", "UNSCALE"})  # under a GradScaler
WIDE: Dtypes = (torch.float32,) * 3
HALF: Dtypes = (torch.bfloat16,) * 3
DOUBLE: Dtypes = (torch.float64,) * 3
MIXED: tuple[Dtypes, ...] = (
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)
# Powers of two are the elements of whole vectors; one less, and each is loaded alone.
POWERS = (1, 4, 16, 64, 128, 256, 1024, 4096)
WIDTHS = {WIDE: POWERS, HALF: POWERS, DOUBLE: (1, 64, 2048)}
ALONE = {WIDE: (3, 63, 1023, 4095), HALF: (63, 4095), DOUBLE: (63,)}
CATCH_UP_WIDTHS = {WIDE: (1, 64, 1024, 4096), HALF: (64, 4096)}
GATED_WIDTHS = {WIDE: (64, 1024, 63), HALF: (64,)}


class Kernel(NamedTuple):
    """What is compiled: an update of rows, or where there is no variant, the making of keys."""

    rule: str
    variant: RowVariant | None = None
    n_hypers: int = 0

    @property
    def name(self) -> str:
        """Rule, flags, dtypes, then the columns, and how many elements are loaded together."""
        variant = self.variant
        if variant is None:
            return self.rule
        names = [*map(short, (variant.param_dtype, variant.grad_dtype, variant.state_dtype))]
        storage = names[0] if len({*names}) == 1 else "/".join(names)
        kind = "sparse" if variant.sparse else "dense"
        shape = f"{variant.columns}/{variant.multiple}"
        gated = " gated" if variant.conditions else ""
        return f"{rule_and_flags(self.rule, variant.flags)} {kind} {storage} {shape}{gated}"

    def compiled(self, architecture: str) -> Any:
        if self.variant is None:
            constants = {"BLOCK_SIZE": row_launcher.KEYS_BLOCK}
            options = {"num_warps": KEYS_WARPS, "enable_fp_fusion": True}
            return compile_for(architecture, keys_kernel, constants, options)
        chosen = config(architecture, self.variant)
        rule = built_in(self.rule)
        constants = row_launcher.constants(rule, self.variant, chosen, self.n_hypers)
        options = row_launcher.options(self.variant, chosen, architecture)
        partials = "*fp64" if self.variant.compute_dtype == torch.float64 else "*fp32"
        return compile_for(architecture, rows_kernel, constants, options, partials_ptr=partials)

    def measures(
        self, architecture: str, binary: Any, code: Sequence[Instruction], usage: Usage
    ) -> Measures:
        """What its machine code says.

        Raises:
            ValueError: the code is not understood.
        """
        gpu, variant, shared = GPUS[architecture], self.variant, binary.metadata.shared
        if variant is None:
            block_rows, warps, multiple = row_launcher.KEYS_BLOCK, KEYS_WARPS, 1
            shape, loop = str(block_rows), Loop(0, 0)
        else:
            block_rows, warps = config(architecture, variant)
            multiple, shape = variant.multiple, f"{block_rows}x{variant.columns}"
            loop = main_loop(code)
        text = binary.asm["amdgcn" if architecture.startswith("gfx") else "ptx"]
        widths = [
            (access.stores, bits, min(VECTOR_BITS, multiple * access.element_bits))
            for access in row_accesses(binary.asm["ttgir"], text, shape)
            for bits in access.bits
        ]
        programs = gpu.resident_warps(warps, usage.registers, shared) // warps
        return {
            "block_rows": block_rows,
            "warps": warps,
            "multiple": multiple,
            "registers": usage.registers,
            "spills": usage.spills,
            "shared": shared,
            "load_bits": max(bits for stores, bits, _ in widths if not stores),
            "store_bits": max(bits for stores, bits, _ in widths if stores),
            "accesses": len(widths),
            "split": sum(bits < whole for _, bits, whole in widths),
            "adjacent": 1 if variant is None else adjacent(binary.asm["ttgir"], shape),
            "instructions": len(code),
            "loop": loop.instructions,
            "resident_programs": programs,
            "in_flight": programs * warps * gpu.warp_size * loop.outstanding,
        }


_config = row_launcher.config


def config(architecture: str, variant: RowVariant) -> RowConfig:
    """How a GPU's launch is cut into programs, also where kernels are interpreted."""
    named = patch.object(backend, "architecture", lambda _: architecture)
    with patch.object(row_launcher, "COMPILED", True), named:
        return _config(variant, torch.device("cpu"))


def kernel_of(
    name: str,
    kwargs: dict[str, Any],
    dtypes: Dtypes,
    width: int,
    *,
    sparse: bool = True,
) -> Kernel:
    """What an optimizer launches for aligned rows of `width` elements.

    Args:
        dtypes: of parameter, gradient and state.
    """
    param_dtype, grad_dtype, state_dtype = dtypes
    param = Parameter(torch.empty(2, width, dtype=param_dtype))
    optimizer = getattr(triton_optim, name)([param], **kwargs)
    (group,) = optimizer.param_groups
    names = optimizer._current_rule().state_names(group)
    optimizer.state[param] = {n: torch.empty_like(param, dtype=state_dtype) for n in names}
    grad = torch.empty_like(param, dtype=grad_dtype)
    if sparse:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        grad = torch.sparse_coo_tensor(ids, grad, param.shape, check_invariants=False)
    rule, signature = optimizer._current_rule(), GradSignature.of(param, grad, row_wise=True)
    planned = PlannedParam(
        0, param, param, grad, signature, (), 0, rule.active_flags(group), names,
        row_state=rule.row_state,
    )  # fmt: skip
    (variant,) = row_chunking.grouped(rule, optimizer.state, [planned])
    function: str = rule.row_function.__name__
    return Kernel(function, variant.loading([0], [width]), len(rule.values(group)))


def row_kernels() -> list[Kernel]:
    """All that are audited, from the optimizers that launch them."""
    found = [
        Kernel("keys"),
        *_kernels(OPTIMIZERS, WIDTHS),
        *_kernels(OPTIMIZERS, ALONE),
        *_kernels(BY_ROW, WIDTHS, sparse=False),
        *_kernels(BY_ROW, {WIDE: (63, 4095)}, sparse=False),
        *_kernels(BY_ROW[:2], CATCH_UP_WIDTHS, sparse=False, flags=frozenset({"CATCH_UP"})),
        *_kernels(OPTIMIZERS, GATED_WIDTHS, conditions=GATE),
        *_kernels(BY_ROW, {WIDE: (64,)}, sparse=False, conditions=GATE),
        *_kernels(OPTIMIZERS, dict.fromkeys(MIXED, (64,))),
        *_kernels(OPTIMIZERS[1:2], {WIDE: (62, 60), HALF: (60,)}),
        *_kernels(MORE, {WIDE: (64,)}),
    ]
    return [*{kernel.name: kernel for kernel in found}.values()]


def _kernels(
    optimizers: Sequence[Optimizer],
    widths: Mapping[Dtypes, Sequence[int]],
    *,
    sparse: bool = True,
    flags: frozenset[str] = frozenset(),
    conditions: frozenset[str] = frozenset(),
) -> Iterator[Kernel]:
    """Of every width, with more flags and conditions."""
    for (name, kwargs), dtypes in product(optimizers, widths):
        for width in widths[dtypes]:
            kernel = kernel_of(name, kwargs, dtypes, width, sparse=sparse)
            assert kernel.variant is not None
            flagged = kernel.variant._replace(flags=kernel.variant.flags | flags)
            yield kernel._replace(variant=flagged._replace(conditions=conditions))
