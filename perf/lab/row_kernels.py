"""The kernels that update by rows, compiled as `RowLaunch` would have them compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch.nn import Parameter
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton_optim
from lab.gpus import GPUS
from triton_optim.kernels.keys import keys_kernel
from triton_optim.kernels.rows import rows_kernel
from triton_optim.launch import backend, row_chunking, row_launcher
from triton_optim.launch.chunking import PlannedParam
from triton_optim.launch.grad_signature import GradSignature
from triton_optim.launch.row_launcher import RowVariant
from triton_optim.launch.tuning import RowConfig
from triton_optim.rule import Rule

OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {}),
    ("Adagrad", {}),
    ("RMSprop", {"sparse": "lazy"}),
    ("RMSprop", {"sparse": "lazy", "centered": True}),
    ("RowwiseAdagrad", {}),
)
KEYS_WARPS = 4  # KeysLaunch's
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
# The kernels' run-time arguments as a GPU is given them; keys of fewer than 2**31 rows.
ARGUMENTS = {
    "tensors_ptr": "*i64",
    "grads_ptr": "*i64",
    "hypers_ptr": "*fp64",
    "steps_ptr": "*fp64",
    "keys_ptr": "*i32",
    "order_ptr": "*i64",
    "partials_ptr": "*fp32",
    "tickets_ptr": "*i32",
    "found_inf_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "happened_ptr": "*fp32",
    "first_tensor": "i32",
    "n_tensors": "i32",
    "chunk": "i32",
}


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
        dtypes = (variant.param_dtype, variant.grad_dtype, variant.state_dtype)
        names = [dtype.replace("float", "f") for dtype in dtypes]
        storage = names[0] if len(set(names)) == 1 else "/".join(names)
        flags = "+".join(sorted(variant.flags)) or "-"
        way = "sparse" if variant.sparse else "dense"
        gated = " gated" if variant.gate else ""
        shape = f"{variant.columns}/{variant.multiple}"
        return f"{self.rule.removesuffix('_rule')} {flags} {way} {storage} {shape}{gated}"


def kernels() -> list[Kernel]:
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
        yield _with(kernel_of(name, kwargs, dtypes, width), gate=GATE)
    for name, kwargs in OPTIMIZERS[2:]:
        yield _with(kernel_of(name, kwargs, wide, 64, sparse=False), gate=GATE)
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


def kernel_of(
    name: str,
    kwargs: dict[str, Any],
    dtypes: Sequence[torch.dtype],
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
    names = optimizer.rule.state_names(group)
    optimizer.state[param] = {n: torch.empty_like(param, dtype=state_dtype) for n in names}
    grad = torch.empty_like(param, dtype=grad_dtype)
    if sparse:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        grad = torch.sparse_coo_tensor(ids, grad, param.shape, check_invariants=False)
    rule = optimizer.rule
    signature = GradSignature.of(param, grad, row_wise=True)
    planned = PlannedParam(
        0, param, param, grad, signature, (), 0, rule.active_flags(group), names,
        row_state=rule.row_state,
    )  # fmt: skip
    (variant,) = row_chunking.grouped(rule, optimizer.state, [planned])
    function: str = rule.row_function.__name__
    return Kernel(function, variant.loading([0], [width]), len(rule.values(group)))


_config = row_launcher.config


def config(architecture: str, variant: RowVariant) -> RowConfig:
    """How a GPU's launch is cut into programs, also where kernels are interpreted."""
    named = patch.object(backend, "architecture", lambda _: architecture)
    with patch.object(row_launcher, "COMPILED", True), named:
        return _config(variant, torch.device("cpu"))


def compiled(architecture: str, kernel: Kernel) -> Any:
    """The kernel that `RowLaunch` or `KeysLaunch` would have compiled."""
    if kernel.variant is None:
        constants = {"BLOCK_SIZE": row_launcher.KEYS_BLOCK}
        options = {"num_warps": KEYS_WARPS, "enable_fp_fusion": True}
        return _compiled(architecture, keys_kernel, ARGUMENTS, constants, options)
    chosen = config(architecture, kernel.variant)
    constants = row_launcher.constants(
        Rule(getattr(backend.rules, kernel.rule)), kernel.variant, chosen, kernel.n_hypers
    )
    options = row_launcher.options(kernel.variant, chosen, architecture)
    partials = "*fp64" if kernel.variant.compute_dtype == torch.float64 else "*fp32"
    types = {**ARGUMENTS, "partials_ptr": partials}
    return _compiled(architecture, rows_kernel, types, constants, options)


def _compiled(
    architecture: str,
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    names = function.arg_names
    pointers = [n for n in names if n not in constants and types[n][0] == "*"]
    source = ASTSource(
        function,
        {n: "constexpr" if n in constants else types[n] for n in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    warp_size = GPUS[architecture].warp_size
    if architecture.startswith("gfx"):
        # Triton before 3.5 wants ROCm's linker; what is read here is the assembly before it.
        os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "true")
        target = GPUTarget("hip", architecture, warp_size)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), warp_size)
    return triton.compile(source, target=target, options=options)
