"""The launchers of the deformable convolution. Images are [B, H, W, C] here, channels adjacent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _dispatch
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

# Bytes of columns that exist at a time where there must be any.
columns_limit = 2**29


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
        (all_taps * triton.cdiv(size, settings["BLOCK"]),),
        offset,
        mask,
        rows,
        weights,
        found,
        size,
        pixels,
        offset.stride(),
        (0, 0, 0) if mask is None else mask.stride(),
        (height, width, out_width),
        _numbers(geometry),
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
            images * triton.cdiv(pixels, options["BM"]),
            plan.offset_groups * triton.cdiv(run, options["BK"]),
        ),
        x,
        plan.rows,
        plan.weights,
        columns,
        plan.size,
        pixels,
        columns.stride(),
        (c, c, run, run),
        K=plan.taps,
        EVEN=run % options["BK"] == 0,
        WIDE=_is_wide(x, plan),
        PTX=_dispatch.inline_ptx(x.device),
        enable_fp_fusion=True,
        **options,
    )


def _sample_grads(
    grad: Tensor, x: Tensor, plan: Plan, needs_x: bool, needs_shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient by columns, [B, L, K, C] of any strides: those by x, and sums for
    `_shift_grads`."""
    by_order = needs_x and torch.are_deterministic_algorithms_enabled()
    d_x, sums = _alloc_grads(x, plan, needs_x and not by_order, needs_shift)
    if d_x is not None or sums is not None:
        c = x.shape[3]
        run = c // plan.offset_groups
        options = _by_line(SAMPLE_BWD.on(x), x, run)
        _dispatch.launch(
            deform_sample_bwd_kernel,
            (triton.cdiv(plan.size, options["BM"]), plan.offset_groups * plan.taps),
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
            triton.cdiv(b * height * width, options["BM"]),
            plan.offset_groups * triton.cdiv(run, options["BK"]),
        ),
        grad,
        plan.weights,
        order,
        starts,
        d_x,
        plan.size,
        plan.pixels,
        grad.stride(),
        (b, height, width),
        (c, run),
        K=plan.taps,
        enable_fp_fusion=True,
        **options,
    )
    return d_x


def _shift_grads(
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
        (taps * triton.cdiv(size, settings["BLOCK"]),),
        sums,
        flat,
        flat_mask,
        d_offset,
        d_mask,
        size,
        flat.shape[2],
        flat.stride(),
        (0, 0, 0) if flat_mask is None else flat_mask.stride(),
        (x.shape[1], x.shape[2], out_width),
        _numbers(geometry),
        enable_fp_fusion=True,
        **settings,
    )
    return d_offset, d_mask


def _conv(x: Tensor, plan: Plan, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill ``out``, [P, groups * CO]; ``w``: [groups, K, C / groups, CO]."""
    sizes, options = _products(CONV_FWD.on(x), x, plan, w)
    _dispatch.launch(
        deform_conv_fwd_kernel,
        (triton.cdiv(plan.size, options["BM"]) * triton.cdiv(w.shape[3], options["BN"]), len(w)),
        x,
        plan.rows,
        plan.weights,
        w,
        bias,
        out,
        plan.size,
        sizes,
        K=plan.taps,
        WIDE=_is_wide(x, plan),
        enable_fp_fusion=True,
        **options,
    )


def _conv_data_grads(
    grad: Tensor, x: Tensor, plan: Plan, w: Tensor, needs_x: bool, needs_shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient by outputs, [P, groups * CO]: those by x, and sums for `_shift_grads`."""
    d_x, sums = _alloc_grads(x, plan, needs_x, needs_shift)
    sizes, options = _products(CONV_BWD.on(x), x, plan, w)
    _dispatch.launch(
        deform_conv_bwd_kernel,
        (triton.cdiv(plan.size, options["BM"]), plan.offset_groups * plan.taps),
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


def _conv_weight_grad(grad: Tensor, x: Tensor, plan: Plan, w: Tensor) -> Tensor:
    """As ``w``, in fp32 or fp64, from the gradient by outputs, [P, groups * CO]."""
    sizes, options = _products(CONV_WGRAD.on(x), x, plan, w)
    groups, taps, per_group, out = w.shape
    tiles = taps * triton.cdiv(out, options["BN"]) * (per_group // sizes[3])
    tiles *= triton.cdiv(sizes[3], options["BK"])
    span = triton.cdiv(options.pop("SPLIT"), options["BM"]) * options["BM"]
    splits = triton.cdiv(plan.size, span)
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


def conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    out: Tensor,
) -> None:
    """Fill ``out``, [B, Co, Ho, Wo] in channels-last format: the fused implementation."""
    plan = make_plan(x, offset, mask, geometry)
    _conv(x, plan, _by_tap(weight, x), bias, _rows(out))


def conv_by_columns(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    out: Tensor,
) -> None:
    """As `conv`, with torch's matrix product."""
    w = _by_tap(weight, x)
    groups, _, _, channels = w.shape
    for part in _parts(x, offset, weight):
        plan = make_plan(x[part], offset[part], _slice(mask, part), geometry)
        columns = _by_group(_columns(x[part], plan), groups)
        rows = _rows(out[part]).view(-1, groups, channels).transpose(0, 1)
        if bias is None:
            torch.bmm(columns, w.flatten(1, 2), out=rows)
        else:
            b = bias.view(groups, 1, channels)
            torch.baddbmm(b, columns, w.flatten(1, 2), out=rows)


def conv_grads(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Those by x, offset, mask and weight that are needed, from that by the rows of the output."""
    needs_x, needs_offset, needs_mask, needs_weight = needs
    if needs_x and torch.are_deterministic_algorithms_enabled():
        data = conv_grads_by_columns(grad, x, offset, mask, weight, geometry, [*needs[:3], False])[
            :3
        ]
        if not needs_weight:
            return *data, None
        needs_x = needs_offset = needs_mask = False
    else:
        data = (None, None, None)
    plan = make_plan(x, offset, mask, geometry)
    w = _by_tap(weight, x)
    if needs_x or needs_offset or needs_mask:
        d_x, sums = _conv_data_grads(grad, x, plan, w, needs_x, needs_offset or needs_mask)
        data = _finish(d_x, sums, x, offset, mask, geometry, needs_offset, needs_mask)
    d_w = _like_weight(_conv_weight_grad(grad, x, plan, w), weight) if needs_weight else None
    return *data, d_w


def conv_grads_by_columns(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """As `conv_grads`, with torch's matrix products."""
    w = _by_tap(weight, x)
    groups, taps, per_group, channels = w.shape
    by_image = grad.view(len(x), -1, groups, channels)
    d_w = None
    parts = []
    for part in _parts(x, offset, weight):
        rows = by_image[part].flatten(0, 1).transpose(0, 1)
        where = x[part], offset[part], _slice(mask, part)
        if needs[3]:
            columns = _by_group(_columns(x[part], make_plan(*where, geometry)), groups)
            share = torch.bmm(columns.transpose(1, 2), rows).to(_dispatch.compute_dtype(x.dtype))
            d_w = share if d_w is None else d_w + share
            del columns
        if any(needs[:3]):
            each = torch.bmm(rows, w.flatten(1, 2).transpose(1, 2))
            each = each.view(groups, -1, taps, per_group).permute(1, 2, 0, 3)
            each = each.reshape(len(where[0]), -1, taps, x.shape[3])
            parts.append(grads_of_columns(each, *where, geometry, *needs[:3]))
    data = [_joined([p[i] for p in parts]) for i in range(3)]
    return *data, None if d_w is None else _like_weight(d_w.view(w.shape), weight)


def grads_of_columns(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs_x: bool,
    needs_offset: bool,
    needs_mask: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those by x, offset and mask that are needed, from that by columns [B, L, K, C]."""
    by_order = needs_x and torch.are_deterministic_algorithms_enabled()
    plan = make_plan(x, offset, mask, geometry, cells=by_order)
    d_x, sums = _sample_grads(grad, x, plan, needs_x, needs_offset or needs_mask)
    return _finish(d_x, sums, x, offset, mask, geometry, needs_offset, needs_mask)


def _finish(
    d_x: Tensor | None,
    sums: Tensor | None,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs_offset: bool,
    needs_mask: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_input = None if d_x is None else d_x.to(x.dtype).permute(0, 3, 1, 2)
    if sums is None:
        return d_input, None, None
    return d_input, *_shift_grads(sums, x, offset, mask, geometry, needs_offset, needs_mask)


def _columns(x: Tensor, plan: Plan) -> Tensor:
    columns = x.new_empty((len(x), plan.pixels, plan.taps, x.shape[3]))
    sample(x, plan, columns)
    return columns


def _parts(x: Tensor, offset: Tensor, weight: Tensor) -> list[slice]:
    """Images by their numbers, so many at a time that their columns keep to the limit."""
    taps, pixels = weight.shape[2] * weight.shape[3], offset.shape[2] * offset.shape[3]
    bytes_per_image = taps * pixels * x.shape[3] * x.element_size()
    count = triton.cdiv(len(x), max(1, columns_limit // bytes_per_image))
    step = triton.cdiv(len(x), count)
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [t for t in parts if t is not None]
    return torch.cat(found) if found else None


def _slice(t: Tensor | None, part: slice) -> Tensor | None:
    return None if t is None else t[part]


def _by_group(columns: Tensor, groups: int) -> Tensor:
    """[B, L, K, C] as [groups, P, K * C / groups]."""
    b, length, taps, c = columns.shape
    split = columns.view(b * length, taps, groups, c // groups).permute(2, 0, 1, 3)
    return split.reshape(groups, b * length, -1)


def _by_tap(weight: Tensor, x: Tensor) -> Tensor:
    """[Co, C / groups, kh, kw] as [groups, K, C / groups, Co / groups]."""
    per_group = weight.shape[1]
    groups = x.shape[3] // per_group
    w = weight.reshape(groups, len(weight) // groups, per_group, -1)
    return w.permute(0, 3, 2, 1).contiguous()


def _like_weight(d_w: Tensor, weight: Tensor) -> Tensor:
    return d_w.permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype)


def _rows(out: Tensor) -> Tensor:
    """[B, Co, Ho, Wo] in channels-last format as [P, Co]."""
    return out.permute(0, 2, 3, 1).flatten(0, 2)


def _alloc_grads(
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
    return max(x.numel(), plan.weights.numel()) >= 2**31


def _by_line(values: Any, x: Tensor, run: int) -> dict[str, Any]:
    """Settings with the number of channels in a chunk in place of its bytes."""
    options = dict(values)
    chunk = max(options.pop("LINE") // x.element_size(), 16)
    return {**options, "BK": min(chunk, max(16, triton.next_power_of_2(run)))}


def _products(
    values: Any, x: Tensor, plan: Plan, w: Tensor
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes and options of a kernel that multiplies matrices."""
    c, per_offset = x.shape[3], x.shape[3] // plan.offset_groups
    per_group, out = w.shape[2:]
    run = math.gcd(per_group, per_offset)
    options = _by_line(values, x, run)
    options["BN"] = min(options["BN"], max(16, triton.next_power_of_2(out)))
    precision = _dispatch.precision(x.dtype)
    if precision == "ieee" and x.dtype in (torch.float32, torch.float64):
        # Without tensor cores a program holds its operands in registers.
        options |= {key: min(options[key], 32) for key in ("BM", "BN")} | {"BK": 16}
    options["EVEN"] = run % options["BK"] == 0
    options["PTX"] = _dispatch.inline_ptx(x.device)
    options["PRECISION"] = precision
    return (c, per_group, per_offset, run, out), options
