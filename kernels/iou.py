"""Pairwise box IoU, its generalized, distance and complete forms, forward and backward.

With areas A1, A2 and the intersection I = max(w, 0) max(h, 0) of two xyxy boxes:

    iou = I / (A1 + A2 - I)      iof = I / A1      0 where the denominator is 0

    d iou = [(A1 + A2) dI - I (dA1 + dA2)] / (A1 + A2 - I)^2      d iof = [A1 dI - I dA1] / A1^2

min and max split the gradient of a tie in halves and the clamp passes it at 0, as torch does.
The forward value is that of IEEE arithmetic in the order written here, without fused
multiply-adds, so that a comparison with a threshold is the same on every machine. The other kinds
take a penalty (`_boxes.py`) from that value; its quotients are Triton's own.

Bytes: forward writes s N M, and reads 4 s (N + M) once per tile; backward reads s N M per side.
Instructions per pair on sm_90, fp32: about 73 forward, 64 to 77 backward; with a penalty 109 (GIoU)
to 186 (CIoU, of angles that threads repeat) forward, 109 to 194 backward.
"""

import triton
import triton.language as tl

from ._boxes import between_centres, hull, penalty, share, slopes, turned
from ._math import atan_ratio, box_area, box_overlap, div_rn_sparse, nan_max


@triton.jit
def _load_boxes(ptr, index, mask, ACC: tl.constexpr):
    p = ptr + index * 4
    x1 = tl.load(p, mask=mask, other=0).to(ACC)
    y1 = tl.load(p + 1, mask=mask, other=0).to(ACC)
    x2 = tl.load(p + 2, mask=mask, other=0).to(ACC)
    y2 = tl.load(p + 3, mask=mask, other=0).to(ACC)
    return x1, y1, x2, y2


@triton.jit
def _down(x1, y1, x2, y2):
    return x1[:, None], y1[:, None], x2[:, None], y2[:, None]


@triton.jit
def _across(x1, y1, x2, y2):
    return x1[None, :], y1[None, :], x2[None, :], y2[None, :]


@triton.jit
def _angle(x1, y1, x2, y2, OFFSET: tl.constexpr):
    return atan_ratio(x2 - x1 + OFFSET, y2 - y1 + OFFSET)


@triton.jit
def _denominator(area1, area2, inter, IOF: tl.constexpr):
    if IOF:
        return area1 + inter * 0  # only for its shape
    else:
        return area1 + area2 - inter


@triton.jit
def box_iou_fwd_kernel(
    boxes1_ptr,  # [B, N, 4] fp16 | bf16 | fp32 | fp64
    boxes2_ptr,  # [B, M, 4]
    out_ptr,  # [B, N, M]
    n,
    m,
    OFFSET: tl.constexpr,
    KIND: tl.constexpr,  # "iou" | "iof" | "giou" | "diou" | "ciou"
    EPS: tl.constexpr,  # of a penalty
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program owns a BLOCK_N x BLOCK_M tile of one batch entry."""
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = pid // (tiles_n * tiles_m)
    rows = pid // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ax1, ay1, ax2, ay2 = _load_boxes(boxes1_ptr, batch * n + rows, rows < n, ACC)
    bx1, by1, bx2, by2 = _load_boxes(boxes2_ptr, batch * m + cols, cols < m, ACC)
    area_a = box_area(ax1, ay1, ax2, ay2, OFFSET)[:, None]
    area_b = box_area(bx1, by1, bx2, by2, OFFSET)[None, :]
    turn = 0.0
    if KIND == "ciou":
        angle_a = _angle(ax1, ay1, ax2, ay2, OFFSET)
        turn = angle_a[:, None] - _angle(bx1, by1, bx2, by2, OFFSET)[None, :]
    ax1, ay1, ax2, ay2 = _down(ax1, ay1, ax2, ay2)
    bx1, by1, bx2, by2 = _across(bx1, by1, bx2, by2)
    w, h = box_overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, OFFSET)
    inter = nan_max(w, 0.0) * nan_max(h, 0.0)
    below = _denominator(area_a, area_b, inter, KIND == "iof")
    value = tl.where(below == 0, 0.0, div_rn_sparse(inter, below))
    if KIND != "iou" and KIND != "iof":
        c_w, c_h = hull(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, OFFSET)
        c_w, c_h = nan_max(c_w, 0.0), nan_max(c_h, 0.0)
        d_x, d_y = between_centres(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
        value -= penalty(value, below, c_w, c_h, d_x, d_y, turn, KIND, EPS)
    out = out_ptr + (batch * n + rows)[:, None] * m + cols[None, :]
    tl.store(
        out, value.to(out_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (cols < m)[None, :]
    )


@triton.jit
def box_iou_bwd_kernel(
    own_ptr,  # [B, N, 4]: the side whose gradient this is
    other_ptr,  # [B, M, 4]
    grad_ptr,  # gradient of the IoU, read through its strides
    partial_ptr,  # [splits, B, N, 4] ACC
    n,
    m,
    chunk,  # of the other side, per split; a multiple of BLOCK_M
    grad_stride_batch,
    grad_stride_own,
    grad_stride_other,
    OFFSET: tl.constexpr,
    IOF: tl.constexpr,
    OWN_IS_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program owns BLOCK_N boxes and sums over one chunk of the other side, in order."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0).to(tl.int64) // tiles_n
    rows = tl.program_id(0).to(tl.int64) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    x1, y1, x2, y2 = _load_boxes(own_ptr, batch * n + rows, rows < n, ACC)
    area = box_area(x1, y1, x2, y2, OFFSET)
    sum_x1 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_y1 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_x2 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_y2 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_area = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, m), BLOCK_M):
        cols = start + tl.arange(0, BLOCK_M)
        ok = (rows < n)[:, None] & (cols < m)[None, :]
        ox1, oy1, ox2, oy2 = _load_boxes(other_ptr, batch * m + cols, cols < m, ACC)
        at = batch * grad_stride_batch + rows[:, None] * grad_stride_own
        g = tl.load(grad_ptr + at + cols[None, :] * grad_stride_other, mask=ok, other=0).to(ACC)
        w, h = box_overlap(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None],
            ox1[None, :], oy1[None, :], ox2[None, :], oy2[None, :], OFFSET,
        )  # fmt: skip
        inter = nan_max(w, 0.0) * nan_max(h, 0.0)
        other_area = box_area(ox1, oy1, ox2, oy2, OFFSET)
        if OWN_IS_FIRST:
            below = _denominator(area[:, None], other_area[None, :], inter, IOF)
        else:
            below = _denominator(other_area[None, :], area[:, None], inter, IOF)
        iou = inter / below
        # No gradient through a pair without an IoU: one bad box must not spoil the others' sums.
        ok = ok & (iou == iou)
        scale = tl.where(ok, g / below, 0.0)
        iou = tl.where(ok, iou, 0.0)
        if IOF:
            d_inter = scale
        else:
            d_inter = scale * (1 + iou)
        if OWN_IS_FIRST or not IOF:
            sum_area -= scale * iou
        ok = ok & (w >= 0) & (h >= 0)
        d_w = tl.where(ok, d_inter * h, 0.0)
        d_h = tl.where(ok, d_inter * w, 0.0)
        sum_x1 -= d_w * share(x1[:, None] > ox1[None, :], x1[:, None] == ox1[None, :], ACC)
        sum_y1 -= d_h * share(y1[:, None] > oy1[None, :], y1[:, None] == oy1[None, :], ACC)
        sum_x2 += d_w * share(x2[:, None] < ox2[None, :], x2[:, None] == ox2[None, :], ACC)
        sum_y2 += d_h * share(y2[:, None] < oy2[None, :], y2[:, None] == oy2[None, :], ACC)
    d_area = tl.sum(sum_area, axis=1)
    # Selects, for the sides of a bad box are not finite.
    d_w = tl.where(d_area == 0, 0.0, d_area * (y2 - y1 + OFFSET))
    d_h = tl.where(d_area == 0, 0.0, d_area * (x2 - x1 + OFFSET))
    out = partial_ptr + ((split * (tl.num_programs(0) // tiles_n) + batch) * n + rows) * 4
    tl.store(out, tl.sum(sum_x1, axis=1) - d_w, mask=rows < n)
    tl.store(out + 1, tl.sum(sum_y1, axis=1) - d_h, mask=rows < n)
    tl.store(out + 2, tl.sum(sum_x2, axis=1) + d_w, mask=rows < n)
    tl.store(out + 3, tl.sum(sum_y2, axis=1) + d_h, mask=rows < n)


@triton.jit
def box_iou_penalty_bwd_kernel(
    own_ptr,  # [B, N, 4]: the side whose gradient this is
    other_ptr,  # [B, M, 4]
    grad_ptr,  # gradient of the value, read through its strides
    partial_ptr,  # [splits, B, N, 4] ACC
    n,
    m,
    chunk,  # of the other side, per split; a multiple of BLOCK_M
    grad_stride_batch,
    grad_stride_own,
    grad_stride_other,
    OFFSET: tl.constexpr,
    KIND: tl.constexpr,  # "giou" | "diou" | "ciou", which are symmetric
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program owns BLOCK_N boxes and sums over one chunk of the other side, in order."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0).to(tl.int64) // tiles_n
    rows = tl.program_id(0).to(tl.int64) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    x1, y1, x2, y2 = _load_boxes(own_ptr, batch * n + rows, rows < n, ACC)
    area = box_area(x1, y1, x2, y2, OFFSET)
    own_w, own_h = x2 - x1 + OFFSET, y2 - y1 + OFFSET
    angle = atan_ratio(own_w, own_h)
    x1, y1, x2, y2 = _down(x1, y1, x2, y2)
    sum_x1 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_y1 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_x2 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_y2 = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_area = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_angle = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, m), BLOCK_M):
        cols = start + tl.arange(0, BLOCK_M)
        ok = (rows < n)[:, None] & (cols < m)[None, :]
        ox1, oy1, ox2, oy2 = _load_boxes(other_ptr, batch * m + cols, cols < m, ACC)
        other_area = box_area(ox1, oy1, ox2, oy2, OFFSET)
        turn = 0.0
        if KIND == "ciou":
            turn = angle[:, None] - _angle(ox1, oy1, ox2, oy2, OFFSET)[None, :]
        ox1, oy1, ox2, oy2 = _across(ox1, oy1, ox2, oy2)
        at = batch * grad_stride_batch + rows[:, None] * grad_stride_own
        g = tl.load(grad_ptr + at + cols[None, :] * grad_stride_other, mask=ok, other=0).to(ACC)
        d_x1, d_y1, d_x2, d_y2, d_area, d_angle = _pair(
            g, ok, x1, y1, x2, y2, ox1, oy1, ox2, oy2,
            area[:, None], other_area[None, :], turn, OFFSET, KIND, EPS,
        )  # fmt: skip
        sum_x1 += d_x1
        sum_y1 += d_y1
        sum_x2 += d_x2
        sum_y2 += d_y2
        sum_area += d_area
        if KIND == "ciou":
            sum_angle += d_angle
    d_w, d_h = turned(tl.sum(sum_angle, axis=1), own_w, own_h)
    d_area = tl.sum(sum_area, axis=1)
    # Selects, for the sides of a bad box are not finite.
    d_w += tl.where(d_area == 0, 0.0, d_area * own_h)
    d_h += tl.where(d_area == 0, 0.0, d_area * own_w)
    out = partial_ptr + ((split * (tl.num_programs(0) // tiles_n) + batch) * n + rows) * 4
    tl.store(out, tl.sum(sum_x1, axis=1) - d_w, mask=rows < n)
    tl.store(out + 1, tl.sum(sum_y1, axis=1) - d_h, mask=rows < n)
    tl.store(out + 2, tl.sum(sum_x2, axis=1) + d_w, mask=rows < n)
    tl.store(out + 3, tl.sum(sum_y2, axis=1) + d_h, mask=rows < n)


@triton.jit
def _pair(
    g, ok, x1, y1, x2, y2, ox1, oy1, ox2, oy2, area, other_area, turn,
    OFFSET: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """What a pair adds to its own box: by its coordinates, its area and its angle."""
    w, h = box_overlap(x1, y1, x2, y2, ox1, oy1, ox2, oy2, OFFSET)
    inter = nan_max(w, 0.0) * nan_max(h, 0.0)
    c_w, c_h = hull(x1, y1, x2, y2, ox1, oy1, ox2, oy2, OFFSET)
    c_w, c_h = nan_max(c_w, 0.0), nan_max(c_h, 0.0)
    d_x, d_y = between_centres(x1, y1, x2, y2, ox1, oy1, ox2, oy2)
    d_inter, d_area, d_cw, d_ch, d_cx, d_cy, d_angle = slopes(
        g, ok, inter, area + other_area - inter, c_w, c_h, d_x, d_y, turn, KIND, 0.0, EPS
    )
    over = (d_inter != 0) & (w >= 0) & (h >= 0)
    # The overlap's share and the hull's: s (d_w - d_cw) + d_cw.
    d_w = tl.where(over, d_inter * h, 0.0) - d_cw
    d_h = tl.where(over, d_inter * w, 0.0) - d_ch
    ACC: tl.constexpr = x1.dtype
    d_x1 = d_cx - (d_w * share(x1 > ox1, x1 == ox1, ACC) + d_cw)
    d_y1 = d_cy - (d_h * share(y1 > oy1, y1 == oy1, ACC) + d_ch)
    d_x2 = d_cx + (d_w * share(x2 < ox2, x2 == ox2, ACC) + d_cw)
    d_y2 = d_cy + (d_h * share(y2 < oy2, y2 == oy2, ACC) + d_ch)
    return d_x1, d_y1, d_x2, d_y2, d_area, d_angle
