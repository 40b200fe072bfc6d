"""Kernels with known faults, and sound twins, for the tests of the tools."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from dlops_triton import _dispatch


@triton.jit
def double_kernel(x_ptr, y_ptr, n, EXTRA: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x; EXTRA lanes too many are active."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs))
    else:
        mask = offs < n + EXTRA
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=mask, other=0), mask=mask)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A cumulative sum and its reverse of a tile far larger than one warp's registers."""
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    up = tl.cumsum(x, axis=0)
    down = tl.cumsum(x, axis=1)
    tl.store(y_ptr + offs, up * down + x)


@triton.jit
def divide_kernel(x_ptr, y_ptr, z_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """z = x / y, IEEE only if EXACT."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    z = tl.math.div_rn(x, y) if EXACT else x / y
    tl.store(z_ptr + offs, z)


@triton.jit
def break_kernel(x_ptr, n):
    """Runs in the interpreter; no compiler takes a break."""
    for i in range(n):
        if tl.load(x_ptr + i) > 0:
            break
        tl.store(x_ptr + i, 1)


@triton.jit
def ptx_kernel(x_ptr, BLOCK: tl.constexpr):
    """Compiles for NVIDIA alone."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(x_ptr + offs, y)


@triton.jit
def rows_kernel(x_ptr, y_ptr, rows, stride, BLOCK: tl.constexpr):
    """Sum of rows, as a loop."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        total += tl.load(x_ptr + row * stride + offs)
    tl.store(y_ptr + offs, total)


@triton.jit
def gather_kernel(x_ptr, index_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = x[index], whatever the indices."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    index = tl.load(index_ptr + offs, mask=mask, other=0)
    tl.store(y_ptr + offs, tl.load(x_ptr + index, mask=mask, other=0), mask=mask)


@triton.jit
def far_row_kernel(x_ptr, y_ptr, row, stride, WIDE: tl.constexpr):
    """y = x[row, 0], with an offset that may overflow 32 bits."""
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr, tl.load(x_ptr + row * stride))


@triton.jit
def follow_kernel(table_ptr, y_ptr):
    """y = *table[0], through an address in memory."""
    tl.store(y_ptr, tl.load(tl.load(table_ptr).to(tl.pointer_type(tl.float32))))


@triton.jit
def count_kernel(x_ptr, counts_ptr, BLOCK: tl.constexpr):
    """counts[x] += 1, atomically."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(counts_ptr + x, 1)


@triton.jit
def running_max_kernel(x_ptr, y_ptr):
    """y[i] = max(x[:i + 1]), by a program that takes y[i - 1] to be there already."""
    i = tl.program_id(2) + tl.num_programs(2) * (
        tl.program_id(1) + tl.num_programs(1) * tl.program_id(0)
    )
    x = tl.load(x_ptr + i)
    if i > 0:
        x = tl.maximum(x, tl.load(y_ptr + i - 1))
    tl.store(y_ptr + i, x)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, z_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    """z = x OP y, in the type of x and y."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "+":
        z = x + y
    elif OP == "-":
        z = x - y
    elif OP == "*":
        z = x * y
    elif OP == "/":
        z = x / y
    elif OP == "min":
        z = tl.minimum(x, y)
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "<":
        z = x < y
    elif OP == "!=":
        z = x != y
    elif OP == "literal":
        z = x * 1.7 + tl.full([BLOCK], 0.3, x.dtype)
    elif OP == "where":
        z = tl.where(x > y, x, y * 0)
    elif OP == "-x":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    tl.store(z_ptr + offs, z)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = x, in the type of y."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y = OP over the columns of x, or over both axes."""
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * COLS + tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + offs)
    if OP == "sum":
        tl.store(y_ptr + rows, tl.sum(x, axis=1))
    elif OP == "sum of all":
        tl.store(y_ptr, tl.sum(x))
    elif OP == "sum, kept":
        tl.store(y_ptr + rows[:, None], tl.sum(x, axis=1, keep_dims=True))
    elif OP == "max":
        tl.store(y_ptr + rows, tl.max(x, axis=1))
    elif OP == "argmin":
        tl.store(y_ptr + rows, tl.argmin(x, axis=1))
    elif OP == "cumsum":
        tl.store(y_ptr + offs, tl.cumsum(x, axis=1))
    elif OP == "sort":
        tl.store(y_ptr + offs, tl.sort(x, dim=1))


@triton.jit
def loop_kernel(bounds_ptr, y_ptr, step):
    """y = steps from bounds[0] to bounds[1], times a scalar argument."""
    total = 0
    for _ in range(tl.load(bounds_ptr), tl.load(bounds_ptr + 1)):
        total += 1
    tl.store(y_ptr, total * step.to(tl.float64))


def _double(n: int, even: bool) -> None:
    x = torch.empty(n)
    _dispatch.launch(
        double_kernel, (triton.cdiv(n, 1024),), x, torch.empty_like(x), n,
        EXTRA=0, EVEN=even, BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _spill() -> None:
    x = torch.empty(128, 128)
    _dispatch.launch(
        spilling_kernel, (1,), x, torch.empty_like(x), BLOCK=128, num_warps=1, enable_fp_fusion=True
    )


def _divide(exact: bool) -> None:
    x = torch.empty(128)
    _dispatch.launch(
        divide_kernel, (1,), x, x, x, EXACT=exact, BLOCK=128, num_warps=1, enable_fp_fusion=False
    )


def _break() -> None:
    _dispatch.launch(break_kernel, (1,), torch.empty(8), 8, num_warps=1, enable_fp_fusion=True)


def _ptx() -> None:
    _dispatch.launch(
        ptx_kernel, (1,), torch.empty(128), BLOCK=128, num_warps=1, enable_fp_fusion=True
    )


def _rows(stride: int) -> None:
    x = torch.empty(64, stride)
    _dispatch.launch(
        rows_kernel, (1,), x, x[0], 64, stride, BLOCK=512, num_warps=4, enable_fp_fusion=True
    )


CASES: list[tuple[str, Callable[[], None]]] = [
    ("even", lambda: _double(4096, even=True)),
    ("even again", lambda: _double(8192, even=True)),
    ("ragged", lambda: _double(1000, even=False)),
    ("spill", _spill),
    ("exact division", lambda: _divide(exact=True)),
    ("division", lambda: _divide(exact=False)),
    ("break", _break),
    ("PTX", _ptx),
    ("rows", lambda: _rows(512)),
    ("odd rows", lambda: _rows(1001)),
]
