"""The launchers of the deformable convolution. Images are [B, H, W, C] here, channels adjacent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch
from ._dispatch import cdiv, next_power_of_2
from ._settings import Settings
from .kernels.deform import (
    deform_conv_bwd_kernel,
    deform_conv_fwd_kernel,
    deform_conv_wgrad_kernel,
    deform_gather_kernel,
    deform_plan_kernel,
    deform_sample_bwd_kernel,
    deform_sample_fwd_kernel,
    deform_shift_bwd_kernel,
)
from .reference.deform import Geometry

# LINE: bytes of a pixel's channels that a program reads at a time.
PLAN = Settings("deform_plan", fp32={"BLOCK": 128, "num_warps": 4})
SHIFT_BWD = Settings("deform_shift_bwd", fp32={"BLOCK": 128, "num_warps": 4})
SAMPLE_FWD = Settings("deform_sample_fwd", fp32={"BM": 32, "LINE": 128, "num_warps": 4})
SAMPLE_BWD = Settings("deform_sample_bwd", fp32={"BM": 32, "LINE": 128, "num_warps": 4})
GATHER = Settings("deform_gather", fp32={"BM": 8, "LINE": 128, "num_warps": 4})
CONV_FWD = Settings(
    "deform_conv_fwd", fp32={"BM": 64, "BN": 256, "LINE": 128, "num_warps": 4, "num_stages": 2}
)
CONV_BWD = Settings(
    "deform_conv_bwd", fp32={"BM": 64, "BN": 64, "LINE": 128, "num_warps": 8, "num_stages": 3}
)
# SPLIT: at least so many outputs are added up by one program.
CONV_WGRAD = Settings(
    "deform_conv_wgrad",
    fp32={"BM": 64, "BN": 256, "LINE": 128, "SPLIT": 8192, "num_warps": 8, "num_stages": 2},
)


class Plan(NamedTuple):
    rows: Tensor  # [G * K, P, 4] int32: pixels around each sample, -1 around one outside
    weights: Tensor  # [G * K, P, 4]: their weights times the mask, fp32 or fp64
    cells: Tensor | None  # [G * K * P] int32 | int64: between which pixels a sample lies
    pixels: int  # of an output image
    taps: int
    offset_groups: int

    @property
    def size(self) -> int:
        """Outputs of all images."""
        return self.rows.shape[1]


def _numbers(geometry: Geometry) -> tuple[int, ...]:
    (kh, kw), *others = geometry
    return (kh * kw, kw, *(number for pair in others for number in pair))


def channels_last(t: Tensor) -> Tensor:
    """[B, H, W, C], without a copy where ``t`` is in channels_last format."""
    return t.permute(0, 2, 3, 1).contiguous()


def make_plan(
    x: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry, cells: bool = False
) -> Plan:
    b, height, width, _ = x.shape
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    all_taps = offset.shape[1] // 2
    pixels = offset.shape[2] * offset.shape[3]
    size = b * pixels
    rows = x.new_empty((all_taps, size, 4), dtype=torch.int32)
    weights = x.new_empty((all_taps, size, 4), dtype=_dispatch.compute_dtype(x.dtype))
    found = None
    if cells:
        wide = _cells(x, all_taps // taps) >= 2**31
        found = rows.new_empty(all_taps * size, dtype=torch.int64 if wide else torch.int32)
    settings = PLAN.on(x)
    out_width = offset.shape[3]
    offset = offset.flatten(2)
    mask = None if mask is None else mask.flatten(2)
    _dispatch.launch(
        deform_plan_kernel,
        (cdiv(all_taps * size, settings["BLOCK"]),),
        offset,
        mask,
        rows,
        weights,
        found,
        all_taps * size,
        size,
        pixels,
        offset.stride(),
        (0, 0, 0) if mask is None else mask.stride(),
        height,
        width,
        out_width,
        _numbers(geometry),
        WIDE=_long(all_taps * size),
        enable_fp_fusion=True,
        **settings,
    )
    return Plan(rows, weights, found, pixels, taps, all_taps // taps)


def sample(x: Tensor, plan: Plan, columns: Tensor) -> None:
    """Fill ``columns``, [B, L, K, C] of any strides."""
    c = x.shape[3]
    run = c // plan.offset_groups
    options = _by_line(SAMPLE_FWD.on(x), x, run)
    images, pixels = columns.shape[:2]
    if columns.stride(0) == pixels * columns.stride(1):
        images, pixels = 1, images * pixels
    _dispatch.launch(
        deform_sample_fwd_kernel,
        (
            images * cdiv(pixels, options["BM"]),
            plan.offset_groups * cdiv(run, options["BK"]),
        ),
        x,
        plan.rows,
        plan.weights,
        columns,
        plan.size,
        pixels,
        columns.stride(),
        (c, run),
        K=plan.taps,
        EVEN=run % options["BK"] == 0,
        WIDE=_is_wide(x, plan),
        PTX=_dispatch.inline_ptx(x.device),
        enable_fp_fusion=True,
        **options,
    )


def sample_grads(
    grad: Tensor, x: Tensor, plan: Plan, needs_x: bool, needs_shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient by columns, [B, L, K, C] of any strides: those by x, and sums for
    `shift_grads`."""
    by_order = needs_x and torch.are_deterministic_algorithms_enabled()
    d_x, sums = _alloc(x, plan, needs_x and not by_order, needs_shift)
    if d_x is not None or sums is not None:
        c = x.shape[3]
        run = c // plan.offset_groups
        options = _by_line(SAMPLE_BWD.on(x), x, run)
        _dispatch.launch(
            deform_sample_bwd_kernel,
            (cdiv(plan.size, options["BM"]), plan.offset_groups * plan.taps),
            grad,
            x if needs_shift else None,
            plan.rows,
            plan.weights,
            d_x,
            sums,
            plan.size,
            plan.pixels,
            grad.stride(),
            (c, run),
            K=plan.taps,
            PTX=_dispatch.inline_ptx(x.device),
            enable_fp_fusion=True,
            **options,
        )
    if by_order:
        d_x = _gather(grad, x, plan)
    return d_x, sums


def _gather(grad: Tensor, x: Tensor, plan: Plan) -> Tensor:
    b, height, width, c = x.shape
    assert plan.cells is not None
    cells, order = torch.sort(plan.cells, stable=True)
    count = _cells(x, plan.offset_groups)
    starts = torch.searchsorted(cells, torch.arange(count + 1, device=x.device, dtype=cells.dtype))
    d_x = torch.empty_like(x)
    run = c // plan.offset_groups
    options = _by_line(GATHER.on(x), x, run)
    _dispatch.launch(
        deform_gather_kernel,
        (
            cdiv(b * height * width, options["BM"]),
            plan.offset_groups * cdiv(run, options["BK"]),
        ),
        grad,
        plan.weights,
        order,
        starts,
        d_x,
        plan.size,
        plan.pixels,
        grad.stride(),
        b,
        height,
        width,
        (c, run),
        K=plan.taps,
        enable_fp_fusion=True,
        **options,
    )
    return d_x


def shift_grads(
    sums: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs_offset: bool,
    needs_mask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by offset and mask."""
    d_offset = offset.new_empty(offset.shape) if needs_offset else None
    d_mask = mask.new_empty(mask.shape) if needs_mask and mask is not None else None
    settings = SHIFT_BWD.on(x)
    taps, size = sums.shape[:2]
    out_width = offset.shape[3]
    flat = offset.flatten(2)
    flat_mask = None if mask is None else mask.flatten(2)
    _dispatch.launch(
        deform_shift_bwd_kernel,
        (cdiv(taps * size, settings["BLOCK"]),),
        sums,
        flat,
        flat_mask,
        d_offset,
        d_mask,
        taps * size,
        size,
        flat.shape[2],
        flat.stride(),
        (0, 0, 0) if flat_mask is None else flat_mask.stride(),
        x.shape[1],
        x.shape[2],
        out_width,
        _numbers(geometry),
        WIDE=_long(taps * size),
        enable_fp_fusion=True,
        **settings,
    )
    return d_offset, d_mask


def conv(x: Tensor, plan: Plan, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill ``out``, [P, groups * CO]; ``w``: [groups, K, C / groups, CO]."""
    sizes, options = _products(CONV_FWD.on(x), x, plan, w)
    _dispatch.launch(
        deform_conv_fwd_kernel,
        (
            cdiv(plan.size, options["BM"]) * cdiv(w.shape[3], options["BN"]),
            len(w),
        ),
        x,
        plan.rows,
        plan.weights,
        w,
        None if bias is None else bias.contiguous(),
        out,
        plan.size,
        sizes,
        K=plan.taps,
        WIDE=_is_wide(x, plan),
        enable_fp_fusion=True,
        **options,
    )


def conv_data_grads(
    grad: Tensor, x: Tensor, plan: Plan, w: Tensor, needs_x: bool, needs_shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient by outputs, [P, groups * CO]: those by x, and sums for `shift_grads`."""
    d_x, sums = _alloc(x, plan, needs_x, needs_shift)
    sizes, options = _products(CONV_BWD.on(x), x, plan, w)
    _dispatch.launch(
        deform_conv_bwd_kernel,
        (cdiv(plan.size, options["BM"]), plan.offset_groups * plan.taps),
        grad,
        w,
        x if needs_shift else None,
        plan.rows,
        plan.weights,
        d_x,
        sums,
        plan.size,
        sizes,
        K=plan.taps,
        enable_fp_fusion=True,
        **options,
    )
    return d_x, sums


def conv_weight_grad(grad: Tensor, x: Tensor, plan: Plan, w: Tensor) -> Tensor:
    """As ``w``, in fp32 or fp64, from the gradient by outputs, [P, groups * CO]."""
    sizes, options = _products(CONV_WGRAD.on(x), x, plan, w)
    groups, taps, per_group, out = w.shape
    tiles = taps * cdiv(out, options["BN"]) * (per_group // sizes[3])
    tiles *= cdiv(sizes[3], options["BK"])
    # At most 64 of them, for each needs the memory of the weights.
    span = max(options.pop("SPLIT"), cdiv(plan.size, 64))
    span = cdiv(span, options["BM"]) * options["BM"]
    splits = cdiv(plan.size, span)
    parts = x.new_empty((splits, *w.shape), dtype=plan.weights.dtype)
    _dispatch.launch(
        deform_conv_wgrad_kernel,
        (tiles, groups, splits),
        grad,
        x,
        plan.rows,
        plan.weights,
        parts,
        plan.size,
        span,
        sizes,
        K=plan.taps,
        WIDE=_is_wide(x, plan),
        enable_fp_fusion=True,
        **options,
    )
    return parts.sum(0)


def _alloc(
    x: Tensor, plan: Plan, needs_x: bool, needs_shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    d_x = x.new_zeros(x.shape, dtype=plan.weights.dtype) if needs_x else None
    return d_x, torch.empty_like(plan.weights) if needs_shift else None


def _cells(x: Tensor, offset_groups: int) -> int:
    """Squares between four pixels, some of them beyond the border, in all images and groups."""
    b, height, width, _ = x.shape
    return offset_groups * b * (height + 1) * (width + 1)


def _is_wide(x: Tensor, plan: Plan) -> bool:
    """Whether numbers of elements need 64 bits."""
    return _long(max(x.numel(), plan.weights.numel()))


def _long(size: int) -> bool:
    """Whether numbers up to this one, rounded up to a whole block, need 64 bits."""
    return size >= 2**30


def _by_line(values: Any, x: Tensor, run: int) -> dict[str, Any]:
    """Settings with the number of channels in a chunk in place of its bytes."""
    options = dict(values)
    chunk = max(options.pop("LINE") // x.element_size(), 16)
    chunk = min(chunk, max(16, next_power_of_2(run)))
    divisor = run & -run
    return {**options, "BK": min(chunk, divisor) if divisor >= 32 else chunk}


def _products(
    values: Any, x: Tensor, plan: Plan, w: Tensor
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes and options of a kernel that multiplies matrices."""
    c, per_offset = x.shape[3], x.shape[3] // plan.offset_groups
    per_group, out = w.shape[2:]
    run = math.gcd(per_group, per_offset)
    options = _by_line(values, x, run)
    options["BN"] = min(options["BN"], max(16, next_power_of_2(out)))
    precision = _dispatch.precision(x.dtype, x.device)
    if precision == "ieee" and x.dtype in (torch.float32, torch.float64):
        # Without tensor cores a program holds its operands in registers.
        options |= {key: min(options[key], 32) for key in ("BM", "BN")} | {"BK": 16}
    options["EVEN"] = run % options["BK"] == 0
    options["PTX"] = _dispatch.inline_ptx(x.device)
    options["PRECISION"] = precision
    return (c, per_group, per_offset, run, out), options
