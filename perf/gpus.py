"""What GPUs can do according to their makers: the rates and limits that predictions rest on.

Nothing here is measured by this project; `probe` measures, and the report shows both. Rates are
those of the boost clock, which a GPU under load may not hold.

Sources. H200, H100: their datasheets (SXM) and the H100 architecture whitepaper (one chip, GH100).
A100: datasheet of the 80 GB SXM model, A100 architecture whitepaper. RTX 4090: Ada architecture
whitepaper v2, appendix A. Registers, warps, programs and shared memory of all these: CUDA C++
programming guide, "Technical specifications per compute capability"; special functions per clock:
the same, "Arithmetic instructions". MI300X: AMD Instinct MI300X datasheet, CDNA 3 whitepaper and
CDNA 3 instruction set reference guide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KIB, MIB = 1 << 10, 1 << 20

# A plain copy reaches about this much of the datasheet's bandwidth: 4.3 of 4.8 TB/s on an H200 and
# 3.0 of 3.35 on an H100, both with torch's copy_, reading and writing counted.
COPY_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """One GPU model. "Core" is an SM (NVIDIA) or a CU (AMD); rates are lanes per clock and core."""

    name: str  # as torch.cuda.get_device_name has it
    target: str  # of the compiler
    cores: int
    clock_hz: float  # boost
    fp32: int  # fused multiply-adds
    tensor_flop_per_s: float  # dense products of matrices in bf16 and fp16
    issue: int  # instructions of any kind
    special: int  # exponentials, logarithms, reciprocals
    dram_bytes_per_s: float
    l2_bytes: int
    warp: int
    registers: int  # 32-bit, per core
    register_step: int  # registers per thread are allocated in steps of this
    warps: int  # resident at most, per core
    programs: int  # resident at most, per core
    shared_bytes: int  # per core
    shared_reserved: int = 0  # of it, per program

    @property
    def copy_bytes_per_s(self) -> float:
        return COPY_SHARE * self.dram_bytes_per_s

    @property
    def instructions_per_s(self) -> float:
        """fp32 instructions of one lane; a fused multiply-add counts once."""
        return self.cores * self.fp32 * self.clock_hz

    def matmul_flop_per_s(self, precision: str) -> float:
        """Of products of matrices, a multiply-add counting twice; TF32 is half as fast as bf16."""
        return {"fp32": 2 * self.instructions_per_s, "tf32": self.tensor_flop_per_s / 2}.get(
            precision, self.tensor_flop_per_s
        )

    def resident(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs of a kernel that one core holds at a time; 0 if not even one fits."""
        registers = -(-max(registers, 1) // self.register_step) * self.register_step
        # A core has four schedulers, each with a quarter of the registers; a warp stays with one.
        per_scheduler = self.registers // 4 // (registers * self.warp)
        fit = [min(4 * per_scheduler, self.warps) // num_warps, self.programs]
        if shared:
            fit.append(self.shared_bytes // (shared + self.shared_reserved))
        return min(fit)

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """Share of the warps that a core can hold which a kernel lets it hold."""
        return self.resident(registers, shared, num_warps) * num_warps / self.warps


H200 = Gpu(
    name="NVIDIA H200",
    target="sm_90",
    cores=132,
    clock_hz=1.98e9,
    fp32=128,
    tensor_flop_per_s=989.4e12,
    issue=128,
    special=16,
    dram_bytes_per_s=4.8e12,
    l2_bytes=60 * MIB,
    warp=32,
    registers=64 * KIB,
    register_step=8,
    warps=64,
    programs=32,
    shared_bytes=228 * KIB,
    shared_reserved=KIB,
)
H100 = replace(
    H200, name="NVIDIA H100 80GB HBM3", dram_bytes_per_s=3.35e12, l2_bytes=50 * MIB
)  # SXM5
A100 = Gpu(
    name="NVIDIA A100-SXM4-80GB",
    target="sm_80",
    cores=108,
    clock_hz=1.41e9,
    fp32=64,
    tensor_flop_per_s=312e12,
    issue=128,
    special=16,
    dram_bytes_per_s=2.039e12,
    l2_bytes=40 * MIB,
    warp=32,
    registers=64 * KIB,
    register_step=8,
    warps=64,
    programs=32,
    shared_bytes=164 * KIB,
    shared_reserved=KIB,
)
RTX_4090 = Gpu(
    name="NVIDIA GeForce RTX 4090",
    target="sm_89",
    cores=128,
    clock_hz=2.52e9,
    fp32=128,
    tensor_flop_per_s=165.2e12,
    issue=128,
    special=16,
    dram_bytes_per_s=1.008e12,
    l2_bytes=72 * MIB,
    warp=32,
    registers=64 * KIB,
    register_step=8,
    warps=48,
    programs=24,
    shared_bytes=100 * KIB,
    shared_reserved=KIB,
)
# A wave of 64 takes a scheduler of 16 lanes four clocks. The datasheet's 163.4 TFLOP/s counts
# packed instructions, which do two elements at once and which plain code has few of.
MI300X = Gpu(
    name="AMD Instinct MI300X",
    target="gfx942",
    cores=304,
    clock_hz=2.1e9,
    fp32=64,
    tensor_flop_per_s=1307.4e12,
    issue=64,
    special=16,
    dram_bytes_per_s=5.3e12,
    l2_bytes=256 * MIB,  # the Infinity Cache; its L2 is 4 MiB per die
    warp=64,
    registers=128 * KIB,
    register_step=8,
    warps=32,
    programs=32,
    shared_bytes=64 * KIB,
)

# By the name that the command line takes.
GPUS = {"H200": H200, "H100": H100, "A100": A100, "4090": RTX_4090, "MI300X": MI300X}
