"""What a call should take on a GPU that is not here, from its machine code and counted traffic.

A kernel takes as long as the slowest of what it does, each at the rate that its programs can reach
on the cores that they fill:

    bytes               sectors touched, at the speed of a copy
    instructions        of all kinds, at one per scheduler and clock
    special functions   at their own rate
    matrix products     at that of tensor cores, in fp32 proper at that of multiply-adds
    atomics             the bytes that they ask for, as fast as a core can exchange them with L2

and a call takes as long as its kernels one after another, with a gap before each. Not in it: the
latency of memory, caches that serve a second reading, additions in memory that wait for each other,
branches not taken, and what torch's own kernels do beyond being launched and multiplying matrices.
The report shows where measurements disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gpus import Gpu

# Between two kernels that depend on each other, in a graph.
GAP_S = 2e-6
# Warps that a core needs to issue at every clock, where each has an instruction ready every other
# clock: two for each of four schedulers.
BUSY_WARPS = 8
# What a core can read from L2, per clock.
CORE_BYTES = 64


@dataclass(frozen=True)
class Launch:
    """What all the launches of one kernel in a call amount to."""

    programs: float  # of one launch
    num_warps: int
    registers: int
    shared: int
    instructions: float  # in all, of one lane
    special: float
    bytes: float
    atomics: float = 0.0  # bytes
    products: float = 0.0  # FLOP
    precision: str = "bf16"


def seconds(gpu: Gpu, launch: Launch) -> tuple[float, str]:
    """How long the launches take without the gaps, and what limits them."""
    programs = max(launch.programs, 1.0)
    per_core = -(-programs // gpu.cores)
    # Of the cores in the long run: those that have a program, and less where the last round of
    # programs leaves some idle.
    cores = programs / per_core
    resident = gpu.resident(launch.registers, launch.shared, launch.num_warps)
    warps = min(max(resident, 1), per_core) * launch.num_warps
    issuing = min(1.0, warps / BUSY_WARPS)
    rates = {
        "bytes": (launch.bytes, min(gpu.copy_bytes_per_s, cores * CORE_BYTES * gpu.clock_hz)),
        "instructions": (launch.instructions, cores * gpu.issue * issuing * gpu.clock_hz),
        "special functions": (launch.special, cores * gpu.special * gpu.clock_hz),
        "atomics": (launch.atomics, cores * CORE_BYTES * gpu.clock_hz),
        "matrix products": (
            launch.products,
            cores / gpu.cores * gpu.matmul_flop_per_s(launch.precision),
        ),
    }
    times = {name: amount / rate for name, (amount, rate) in rates.items()}
    limit = max(times, key=lambda name: times[name])
    return times[limit], limit


def call(parts: list[tuple[float, str]], launches: int) -> tuple[float, str]:
    """The time of a whole call with its gaps, and what takes most of it."""
    shares: dict[str, float] = {"launches": launches * GAP_S}
    for time, limit in parts:
        shares[limit] = shares.get(limit, 0.0) + time
    return sum(shares.values()), max(shares, key=lambda name: shares[name])
