"""Kernels that do one thing only, to find how fast a GPU does it.

`fma_kernel`      fp32 fused multiply-adds, in registers
`read_kernel`     reads of a buffer that stays in the L2
`barrier_kernel`  waits of all programs for each other
`empty_kernel`    launches

Copies, triads and matrix products are torch's own.
"""

# @triton.jit functions take no annotations that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def fma_kernel(
    x_ptr,  # [BLOCK] fp32
    line_ptr,  # [2] fp32: factor and addend
    out_ptr,  # [programs, BLOCK] fp32
    rounds,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program iterates x = factor x + addend, UNROLL x rounds times, on BLOCK numbers.

    A thread's numbers are chains independent of each other, enough to hide an addition's latency.
    """
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    # From memory, so that they lie in registers: other operands may be slower.
    factor = tl.zeros((BLOCK,), tl.float32) + tl.load(line_ptr)
    addend = tl.zeros((BLOCK,), tl.float32) + tl.load(line_ptr + 1)
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            x = tl.fma(x, factor, addend)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * BLOCK + offs, x)


@triton.jit
def read_kernel(
    x_ptr,  # [tiles, BLOCK] fp32
    out_ptr,  # [programs] fp32: the sum of what each program read
    tiles,
    rounds,
    BLOCK: tl.constexpr,
):
    """Each program reads a tile per round; in a round, neighbours read neighbouring tiles.

    The first-level cache is passed by (.cg).
    """
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rounds):
        tile = (program + i * tl.num_programs(0)) % tiles
        total += tl.load(x_ptr + tile.to(tl.int64) * BLOCK + offs, cache_modifier=".cg")
    tl.store(out_ptr + program, tl.sum(total))


@triton.jit
def barrier_kernel(
    counter_ptr,  # int32, 0 at first: arrivals at all barriers so far
    failed_ptr,  # int32, set to 1 by a program that waited in vain
    rounds,
    polls,  # how often a program looks at the counter before it gives up
):
    """Every program waits at `rounds` barriers for all others, which must be resident with it.

    A program that gives up leaves, and so lets all others run into their bound: a grid that cannot
    meet ends, after about `polls` looks.
    """
    programs = tl.num_programs(0)
    expected = 0
    met = 1
    passed = 0
    while (passed < rounds) & (met > 0):
        expected += programs
        tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        arrived = 0
        looks = 0
        while (arrived < expected) & (looks < polls):
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
            looks += 1
        met = (arrived >= expected).to(tl.int32)
        passed += 1
    tl.store(failed_ptr, 1, mask=met == 0)


@triton.jit
def empty_kernel(x_ptr):
    """No program does anything."""
