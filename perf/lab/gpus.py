"""Four GPUs: what limits a kernel on them that streams memory, from what their vendors publish."""

from __future__ import annotations

from typing import NamedTuple

SCHEDULERS = 4  # of an NVIDIA SM; the SIMDs of an AMD CU
REGISTERS = 512  # 32-bit ones, a lane of a scheduler: 65,536 an SM, 131,072 a CU
REGISTER_STEP = 8  # they are given to a thread by the 8
SHARED_RESERVED = 1024  # bytes a program that NVIDIA's SMs keep; AMD's keep none
# From a load to its data, with memory busy; that of an H200, taken for all.
LATENCIES = (0.7e-6, 0.95e-6)  # s


class Gpu(NamedTuple):
    """One GPU. An AMD wavefront is called a warp here, and a CU an SM."""

    name: str
    sms: int
    lanes: int  # threads for which a scheduler issues an instruction in a cycle
    clock: float  # Hz
    bandwidth: float  # bytes/s
    warp_size: int
    max_warps: int  # resident, an SM
    max_programs: int
    shared: int  # bytes of shared memory, an SM

    @property
    def issue(self) -> float:
        """Instructions of a thread a second, over all threads."""
        return self.sms * SCHEDULERS * self.lanes * self.clock

    def resident_warps(self, warps: int, registers: int, shared: int) -> int:
        """Warps an SM, in whole programs of `warps` warps that take so much of it.

        Args:
            warps: of a program.
            registers: a thread.
            shared: bytes a program.
        """
        given = -(-registers // REGISTER_STEP) * REGISTER_STEP
        allowed = min(SCHEDULERS * (REGISTERS // given), self.max_warps)
        programs = min(allowed // warps, self.max_programs)
        return min(programs, self.shared // (shared + SHARED_RESERVED)) * warps

    def arithmetic(self) -> str:
        """Where the limits come from, in a line."""
        low, high = (self.bandwidth * latency / self.sms / 1000 for latency in LATENCIES)
        return (
            f"{self.name}: issue {self.sms} x {SCHEDULERS} x {self.lanes} lanes x "
            f"{self.clock / 1e9:g} GHz = {self.issue / 1e12:.1f}e12/s; memory "
            f"{self.bandwidth / 1e12:g} TB/s; in flight {self.bandwidth / 1e12:g} TB/s x "
            f"{LATENCIES[0] * 1e6:g} to {LATENCIES[1] * 1e6:g} us / {self.sms} = "
            f"{low:.0f} to {high:.0f} KB"
        )


# Warps, programs and shared memory of an SM: CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability"; of a CU: LLVM's llvm-calc-occupancy, AMD's "CDNA3 ISA".
GPUS = {
    # "NVIDIA A100 Tensor Core GPU Architecture": 108 SMs, 1,410 MHz; A100 80GB datasheet.
    "sm_80": Gpu("A100", 108, 32, 1.41e9, 2.039e12, 32, 64, 32, 164 << 10),
    # "NVIDIA H100 Tensor Core GPU Architecture": 132 SMs, which the H200 shares; H200 datasheet.
    # Its 67 TFLOPS in float32 are 1.98 GHz; 1.755, the boost clock of the H100 PCIe in that paper,
    # is taken so that what holds here holds for a card that lowers its clock.
    "sm_90": Gpu("H200", 132, 32, 1.755e9, 4.8e12, 32, 64, 32, 228 << 10),
    # HGX B200 datasheet: 8 TB/s and 75 TFLOPS in float32 a GPU, which are 148 SMs at 1.98 GHz.
    "sm_100": Gpu("B200", 148, 32, 1.98e9, 8e12, 32, 64, 32, 228 << 10),
    # AMD Instinct MI300X data sheet: 304 CUs, 2,100 MHz, 5.3 TB/s. "AMD CDNA 3 Architecture": a
    # SIMD has 16 lanes, so a wavefront of 64 takes 4 cycles an instruction.
    "gfx942": Gpu("MI300X", 304, 16, 2.1e9, 5.3e12, 64, 32, 16, 64 << 10),
}


def peak_bandwidth(name: str, clock_khz: int = 0, bus_bits: int = 0) -> float | None:
    """Bytes a second that a GPU's memory can transfer at the most, or None where it is not known.

    The vendor's figure where the name is one of the above; otherwise that of two transfers a cycle,
    as in all DDR and HBM.

    Args:
        name: as torch has it, such as "NVIDIA H200".
        clock_khz: of the memory; 0 where it is not known.
        bus_bits: width of the memory's bus; 0 where it is not known.
    """
    for gpu in GPUS.values():
        if name.split()[-1:] == [gpu.name]:
            return gpu.bandwidth
    return 2e3 * clock_khz * bus_bits / 8 or None
