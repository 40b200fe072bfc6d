"""GIoU, DIoU and CIoU losses of pairs of boxes, forward and backward.

    loss = 1 - I / (U + eps) + penalty      with the penalties of `_boxes.py`

Backward computes a pair anew, the slopes of the loss by its ingredients and theirs by coordinates.
Only boxes that truly overlap pass a gradient through I, as in torchvision.

Bytes per pair: forward reads 8 s and writes s, or nothing where it reduces; backward reads 8 s and
the gradient, and writes 4 s for each side that wants one. Boxes move in vectors of 16 bytes.
Instructions per pair on sm_90, fp32: 140 (GIoU) to 252 (CIoU) forward, 138 to 374
backward by one side.
"""

import triton
import triton.language as tl

from ._boxes import between_centres, hull, penalty, share, slopes, turned
from ._loss import sum_over_programs
from ._math import atan_ratio, box_area, box_overlap, div_rn, nan_max


@triton.jit
def _load_boxes(ptr, rows, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = rows[:, None] * 4 + tl.arange(0, 4)[None, :]
    boxes = tl.load(ptr + at, mask=(rows < n)[:, None], other=0).to(ACC)
    x, y = tl.split(tl.reshape(boxes, (BLOCK, 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def _store_boxes(ptr, rows, n, x1, y1, x2, y2, BLOCK: tl.constexpr):
    at = rows[:, None] * 4 + tl.arange(0, 4)[None, :]
    boxes = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (BLOCK, 4))
    tl.store(ptr + at, boxes.to(ptr.dtype.element_ty), mask=(rows < n)[:, None])


@triton.jit
def iou_loss_fwd_kernel(
    boxes1_ptr,  # [n, 4] fp16 | bf16 | fp32 | fp64
    boxes2_ptr,  # [n, 4]
    out_ptr,  # "none": [n]; else [1 + programs] ACC: the loss, and scratch
    counter_ptr,  # "none": None; else [1] int32, 0
    n,
    KIND: tl.constexpr,  # "giou" | "diou" | "ciou"
    EPS: tl.constexpr,
    REDUCTION: tl.constexpr,  # "none" | "mean" | "sum"
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK pairs."""
    ACC: tl.constexpr = tl.float64 if boxes1_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ax1, ay1, ax2, ay2 = _load_boxes(boxes1_ptr, rows, n, ACC, BLOCK)
    bx1, by1, bx2, by2 = _load_boxes(boxes2_ptr, rows, n, ACC, BLOCK)
    w, h = box_overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, 0)
    inter = nan_max(w, 0.0) * nan_max(h, 0.0)
    union = box_area(ax1, ay1, ax2, ay2, 0) + box_area(bx1, by1, bx2, by2, 0) - inter
    iou = tl.where(union + EPS == 0, 0.0, div_rn(inter, union + EPS))
    c_w, c_h = hull(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, 0)
    d_x, d_y = between_centres(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    turn = 0.0
    if KIND == "ciou":
        turn = atan_ratio(ax2 - ax1, ay2 - ay1) - atan_ratio(bx2 - bx1, by2 - by1)
    loss = 1 - (iou - penalty(iou, union, c_w, c_h, d_x, d_y, turn, KIND, EPS))
    if REDUCTION == "none":
        tl.store(out_ptr + rows, loss.to(out_ptr.dtype.element_ty), mask=rows < n)
    else:
        share_of_sum = tl.sum(tl.where(rows < n, loss, 0.0), axis=0)
        total, last = sum_over_programs(share_of_sum, out_ptr + 1, counter_ptr)
        if last:
            if REDUCTION == "mean":
                total = total / n
            tl.store(out_ptr, total)


@triton.jit
def iou_loss_bwd_kernel(
    grad_ptr,  # "none": gradient of [n], read through its stride; else [1]
    boxes1_ptr,  # [n, 4]
    boxes2_ptr,  # [n, 4]
    d1_ptr,  # [n, 4], or None
    d2_ptr,  # [n, 4], or None
    n,
    grad_stride,
    KIND: tl.constexpr,  # "giou" | "diou" | "ciou"
    EPS: tl.constexpr,
    REDUCTION: tl.constexpr,  # "none" | "mean" | "sum"
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK pairs."""
    ACC: tl.constexpr = tl.float64 if boxes1_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ax1, ay1, ax2, ay2 = _load_boxes(boxes1_ptr, rows, n, ACC, BLOCK)
    bx1, by1, bx2, by2 = _load_boxes(boxes2_ptr, rows, n, ACC, BLOCK)
    if REDUCTION == "none":
        g = tl.load(grad_ptr + rows * grad_stride, mask=rows < n, other=0).to(ACC)
    else:
        g = tl.load(grad_ptr).to(ACC)
        if REDUCTION == "mean":
            g = g / n
    w, h = box_overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, 0)
    inter = nan_max(w, 0.0) * nan_max(h, 0.0)
    union = box_area(ax1, ay1, ax2, ay2, 0) + box_area(bx1, by1, bx2, by2, 0) - inter
    c_w, c_h = hull(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, 0)
    d_x, d_y = between_centres(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    turn = 0.0
    if KIND == "ciou":
        turn = atan_ratio(ax2 - ax1, ay2 - ay1) - atan_ratio(bx2 - bx1, by2 - by1)
    d_inter, d_area, d_cw, d_ch, d_cx, d_cy, d_angle = slopes(
        -g, rows < n, inter, union, c_w, c_h, d_x, d_y, turn, KIND, EPS, EPS
    )
    over = (d_inter != 0) & (w > 0) & (h > 0)
    # What passes through the overlap's sides beyond what passes through the hull's.
    d_w = tl.where(over, d_inter * h, 0.0) - d_cw
    d_h = tl.where(over, d_inter * w, 0.0) - d_ch
    left, top = share(ax1 > bx1, ax1 == bx1, ACC), share(ay1 > by1, ay1 == by1, ACC)
    right, bottom = share(ax2 < bx2, ax2 == bx2, ACC), share(ay2 < by2, ay2 == by2, ACC)
    if d1_ptr is not None:
        _store_side(
            d1_ptr, rows, n, ax2 - ax1, ay2 - ay1, d_area, d_angle, d_cx, d_cy,
            d_w * left + d_cw, d_h * top + d_ch, d_w * right + d_cw, d_h * bottom + d_ch,
            KIND, BLOCK,
        )  # fmt: skip
    if d2_ptr is not None:
        left, top, right, bottom = 1 - left, 1 - top, 1 - right, 1 - bottom
        _store_side(
            d2_ptr, rows, n, bx2 - bx1, by2 - by1, d_area, -d_angle, -d_cx, -d_cy,
            d_w * left + d_cw, d_h * top + d_ch, d_w * right + d_cw, d_h * bottom + d_ch,
            KIND, BLOCK,
        )  # fmt: skip


@triton.jit
def _store_side(
    ptr, rows, n, w, h, d_area, d_angle, d_cx, d_cy, left, top, right, bottom,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A side's gradient, from those by its area, its angle, its centre and its edges."""
    # Selects, for the sides of a bad box are not finite.
    d_w = tl.where(d_area == 0, 0.0, d_area * h)
    d_h = tl.where(d_area == 0, 0.0, d_area * w)
    if KIND == "ciou":
        by_w, by_h = turned(d_angle, w, h)
        d_w += by_w
        d_h += by_h
    _store_boxes(
        ptr, rows, n, d_cx - left - d_w, d_cy - top - d_h, d_cx + right + d_w, d_cy + bottom + d_h,
        BLOCK,
    )  # fmt: skip
