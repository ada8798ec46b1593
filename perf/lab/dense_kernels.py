"""The kernels that update whole tensors: compiled as `UpdateLaunch` would, and their code read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lab.audit import Measures, dense_report
from lab.compiled import built_in, rule_and_flags, short
from lab.control_flow import Instruction
from lab.gpus import GPUS
from lab.machine_code import Code, MainPath
from triton_optim.kernels.random_bits import SINGLY
from triton_optim.launch import backend, tuning
from triton_optim.launch.variant import ITEM_SIZES, Variant
from triton_optim.testing.compiled import Usage, compile_update


class Kernel(NamedTuple):
    """One kernel, and what an interpreted step with it moves."""

    rule: str
    variant: Variant
    n_hypers: int
    bytes_per_param: float
    launches: int

    @property
    def storage(self) -> tuple[str, str, str]:
        """Dtypes of parameter, gradient and state."""
        return self.variant.param_dtype, self.variant.grad_dtype, self.variant.state_dtype

    @property
    def name(self) -> str:
        storage = "/".join(map(short, self.storage))
        aligned = "" if self.variant.aligned else " misaligned"
        gated = " gated" if self.variant.conditions else ""
        shards = f" shards {self.variant.sharding}" if self.variant.sharding else ""
        return f"{rule_and_flags(self.rule, self.variant.flags)} {storage}{gated}{shards}{aligned}"

    @property
    def draws_eight(self) -> bool:
        """Whether a random number serves the 8 elements that a thread loads together."""
        return self.variant.aligned and self.variant.sharding != SINGLY.value

    def is_followed(self, architecture: str) -> bool:
        """Whether its machine code has one main path; AMD's has none for some.

        Where random numbers are drawn singly, the division of 64 bits for each element branches;
        where state is of 8 bits, what the largest of a group takes.
        """
        branches = self.variant.sharding == SINGLY.value or self.variant.has_groups
        return not (branches and architecture.startswith("gfx"))

    def misaligned(self) -> Kernel:
        """The same over addresses that are no multiple of 16 bytes."""
        return self._replace(variant=self.variant._replace(aligned=False))

    def compiled(self, architecture: str) -> Any:
        return compile_update(built_in(self.rule), self.variant, self.n_hypers, architecture)

    def measures(
        self, architecture: str, binary: Any, code: Sequence[Instruction], usage: Usage
    ) -> Measures:
        """What its machine code says.

        Raises:
            ValueError: the code is not understood.
        """
        gpu, variant = GPUS[architecture], self.variant
        config = tuning.config(architecture, half=variant.half)
        elements = config.chunk // (config.num_warps * gpu.warp_size)  # a thread
        sizes = ITEM_SIZES
        written = sum(sizes[name] for name in variant.written)
        written += sizes[variant.grad_dtype] if "UNSCALE" in variant.conditions else 0
        path = Code(code).main_path(elements * written) or MainPath(0, 0, (), (), 0)
        if path.stores and sum(path.loads) < elements * (variant.bytes_per_element - written):
            raise ValueError("not every load was found")
        shared = binary.metadata.shared
        warps = gpu.resident_warps(config.num_warps, usage.registers, shared)
        measures = {
            "alignment": backend.ALIGNMENT
            if variant.aligned
            else min(sizes[name] for name in (variant.grad_dtype, *variant.written)),
            "registers": usage.registers,
            "spills": usage.spills,
            "shared": shared,
            "load_bits": 8 * max(path.loads, default=0),
            "store_bits": 8 * max(path.stores, default=0),
            "narrowest_bits": 8 * min(_of_elements(variant, path), default=0),
            "vector_bits": 64 if variant.has_groups else 128,  # 8 elements of a byte
            "instructions": round(path.instructions / elements, 2),
            "with_detours": round((path.instructions + path.detours) / elements, 2),
            "resident_warps": warps,
            "in_flight": warps * gpu.warp_size * path.outstanding,
            "bytes_per_param": round(self.bytes_per_param, 4),
            "floor": variant.bytes_per_element,
            "launches": self.launches,
            "issue_allowed": variant.has_groups or (variant.rounds and not self.draws_eight),
        }
        return {**measures, "limit": dense_report(architecture, self.name, measures).limit}


def _of_elements(variant: Variant, path: MainPath) -> list[int]:
    """Bytes of each load and store but those of exponents, a byte for a group."""
    return [n for n in path.loads + path.stores if n > 1 or not variant.has_groups]
