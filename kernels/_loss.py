"""What the fused losses share: a sum over programs in one launch, and the scaling of a gradient.

A reduced loss computes its gradient with it, for an incoming gradient of 1. Its backward launch
then reads the incoming gradient on the device and, finding 1, moves nothing.
"""

import triton
import triton.language as tl


@triton.jit
def sum_over_programs(value, out_ptr, counter_ptr):
    """The sum of every program's ``value`` in the last one to finish, in the others 0; and whether
    this is the last.

    ``out_ptr`` [programs] is scratch. ``counter_ptr`` [1] int32 holds 0 before and after. The order
    of the additions is fixed, whatever the order of the programs.
    """
    CHUNK: tl.constexpr = 1024
    programs = tl.num_programs(0) * tl.num_programs(1)
    pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + pid, value)
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    total = tl.zeros((CHUNK,), value.dtype)
    if last:
        for i in range(0, programs, CHUNK):
            lane = i + tl.arange(0, CHUNK)
            # Past L1, which may hold what was here before the others wrote.
            total += tl.load(out_ptr + lane, mask=lane < programs, other=0.0, cache_modifier=".cg")
        tl.store(counter_ptr, 0)
    return tl.sum(total, axis=0), last


@triton.jit
def scale_kernel(
    dx_ptr,  # [n] contiguous, scaled in place
    grad_ptr,  # [1]
    n,
    BLOCK: tl.constexpr,
):
    """dx *= grad. Each program takes every so many-th block; none moves a byte where grad is 1."""
    ACC: tl.constexpr = tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32
    grad = tl.load(grad_ptr).to(ACC)
    if grad != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = start + tl.arange(0, BLOCK)
            dx = tl.load(dx_ptr + at, mask=at < n, other=0).to(ACC)
            # No gradient stays none, even where the incoming one is infinite.
            dx = tl.where(dx == 0, 0.0, dx * grad)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)
