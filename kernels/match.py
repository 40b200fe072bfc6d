"""Assignment of anchors to ground-truth boxes by IoU, without the N x M matrix.

1. `match_kernel`: each anchor's largest IoU and its first box decide by thresholds; each box's
   largest IoU is left in memory by an integer maximum of its bits, in whatever order.
2. `match_low_quality_kernel`: an anchor goes to the last box whose largest IoU it attains.

IoU is I / (A_a + A_g - I), 0 where that denominator D is 0, in IEEE arithmetic in this order, the
same code in both kernels: the second compares for equality with what the first computed. It lies in
[0, 1] (I <= A, and rounding is monotonic), or is -0 or NaN. NaN becomes -1, less than any IoU.

Few tiles divide:

1. Where no pair of a tile has sides w >= 0 and h >= 0 every IoU is 0 or undefined, which changes
   neither the maximum of an anchor that has one nor that of a box, all of which start at 0.
2. IoU = T, the box's maximum, implies I >= fl(fl(0.99 T) D) if T > 1e-30: then 0.99 T D is less
   than I, a number, so that rounding it does not exceed I. A box of smaller T is never skipped.

Bytes: 16 (N + M) loaded per pass but for what caches hold, 12 N stored. Registers hold the rest.
Instructions per pair on sm_90, fp32: 10 to 14 in a tile that is left out, 2 to 3 in one of padding
alone, 23 in the second pass before it divides, 52 at most.
"""

import triton
import triton.language as tl

from ._math import box_area, box_overlap, div_rn_sparse, nan_max, nan_min


@triton.jit
def _load_boxes(ptr, index, mask, ACC: tl.constexpr):
    """Four coordinates and the area; outside the mask a point at 0."""
    p = ptr + index * 4
    x1 = tl.load(p, mask=mask, other=0).to(ACC)
    y1 = tl.load(p + 1, mask=mask, other=0).to(ACC)
    x2 = tl.load(p + 2, mask=mask, other=0).to(ACC)
    y2 = tl.load(p + 3, mask=mask, other=0).to(ACC)
    return x1, y1, x2, y2, box_area(x1, y1, x2, y2, 0)


@triton.jit
def _sides(gt, anchor):
    """[M, N]: signed widths and heights of the intersections."""
    gx1, gy1, gx2, gy2, _ = gt
    ax1, ay1, ax2, ay2, _ = anchor
    return box_overlap(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2, 0)


@triton.jit
def _areas(w, h, gt, anchor):
    """[M, N]: intersections and unions."""
    inter = nan_max(w, 0.0) * nan_max(h, 0.0)
    return inter, anchor[4] + gt[4] - inter


@triton.jit
def _iou(inter, union):
    """-1 where it is undefined."""
    iou = tl.where(union == 0, 0.0, div_rn_sparse(inter, union))
    return tl.where(iou == iou, iou, -1.0)


@triton.jit
def _any_reaches_0(x):
    """Is any element of a matrix at least 0? A NaN or -0 may count or not.

    In integers, whose maximum over a warp is one instruction and known to be one value.
    """
    BITS: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    bits = x.to(BITS, bitcast=True)
    # Columns lie across threads: they come last.
    return tl.max(tl.max(bits, axis=0), axis=0) >= 0


@triton.jit
def match_kernel(
    anchors_ptr,  # [B, N, 4] fp16 | bf16 | fp32 | fp64
    gt_ptr,  # [B, M, 4]
    valid_ptr,  # [B, M] bool, or None
    matched_ptr,  # [B, N] int64
    max_iou_ptr,  # [B, N] ACC
    top_ptr,  # [B, M] int32 | int64, zeros: bits of each box's largest IoU; or None
    n,
    m,
    anchors_stride,  # of a batch entry; 0 where all have the same anchors
    pos_iou,
    neg_iou,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program matches BLOCK_N anchors of one batch entry, BLOCK_M boxes at a time."""
    ACC: tl.constexpr = max_iou_ptr.dtype.element_ty
    tiles = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0).to(tl.int64) // tiles
    rows = tl.program_id(0).to(tl.int64) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    anchor = _load_boxes(anchors_ptr + batch * anchors_stride, rows, rows < n, ACC)
    best = tl.where(rows < n, -1.0, 0.0).to(ACC)
    index = tl.full((1, BLOCK_N), -1, tl.int32)
    unset = True
    for start in range(0, m, BLOCK_M):
        cols = start + tl.arange(0, BLOCK_M)[:, None]
        at = batch * m + cols
        ok = cols < m
        some = True
        if valid_ptr is not None:
            ok = ok & tl.load(valid_ptr + at, mask=ok, other=0).to(tl.int1)
            some = tl.max(tl.max(ok.to(tl.int32), axis=0), axis=0) > 0
        if some:  # padding costs little
            gt = _load_boxes(gt_ptr, at, ok, ACC)
            w, h = _sides(gt, anchor)
            if _any_reaches_0(nan_min(w, h)) | unset:
                inter, union = _areas(w, h, gt, anchor)
                iou = tl.where(ok, _iou(inter, union), -1.0)
                largest = tl.max(iou, axis=0, keep_dims=True)
                first = tl.min(tl.where(iou == largest, cols, 2147483647), axis=0, keep_dims=True)
                index = tl.where(largest > best, first, index)
                best = tl.maximum(best, largest)
                unset = tl.max(tl.max((best < 0).to(tl.int32), axis=0), axis=0) > 0
                if top_ptr is not None:
                    # Bits of an IoU are ordered as it is; those of -1 and -0 are less than 0.
                    bits = iou.to(top_ptr.dtype.element_ty, bitcast=True)
                    bits = tl.max(bits, axis=1, keep_dims=True)
                    tl.atomic_max(top_ptr + at, bits, mask=ok & (bits > 0), sem="relaxed")
    matched = tl.where(best < neg_iou, -1, -2)  # -1 where no IoU is known, too
    matched = tl.where(best >= pos_iou, index, matched)
    out = batch * n + rows
    tl.store(matched_ptr + out, matched.to(tl.int64), mask=rows < n)
    tl.store(max_iou_ptr + out, tl.where(best > 0, best, 0.0), mask=rows < n)


@triton.jit
def match_low_quality_kernel(
    anchors_ptr,  # as in match_kernel
    gt_ptr,
    valid_ptr,
    top_ptr,  # [B, M] int32 | int64, complete
    matched_ptr,  # [B, N] int64, overwritten where an anchor attains a box's largest IoU
    n,
    m,
    anchors_stride,
    min_pos_iou,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program reconsiders BLOCK_N anchors of one batch entry, BLOCK_M boxes at a time."""
    ACC: tl.constexpr = tl.float64 if top_ptr.dtype.element_ty == tl.int64 else tl.float32
    tiles = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0).to(tl.int64) // tiles
    rows = tl.program_id(0).to(tl.int64) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    anchor = _load_boxes(anchors_ptr + batch * anchors_stride, rows, rows < n, ACC)
    index = tl.full((1, BLOCK_N), -1, tl.int32)
    for start in range(0, m, BLOCK_M):
        cols = start + tl.arange(0, BLOCK_M)[:, None]
        at = batch * m + cols
        ok = cols < m
        top = tl.load(top_ptr + at, mask=ok, other=0).to(ACC, bitcast=True)
        if valid_ptr is not None:
            ok = ok & tl.load(valid_ptr + at, mask=ok, other=0).to(tl.int1)
        ok = ok & (top >= min_pos_iou)
        level = tl.where(ok, tl.where(top < 1e-30, 2, 1), 0)
        level = tl.max(tl.max(level, axis=0), axis=0)
        small = level == 2
        if level > 0:
            top = tl.where(ok, top, 2.0)  # out of reach
            gt = _load_boxes(gt_ptr, at, ok, ACC)
            w, h = _sides(gt, anchor)
            if _any_reaches_0(nan_min(w, h)) | small:
                inter, union = _areas(w, h, gt, anchor)
                if _any_reaches_0(inter - top * 0.99 * union) | small:
                    attained = _iou(inter, union) == top
                    last = tl.max(tl.where(attained, cols, -1), axis=0, keep_dims=True)
                    index = tl.maximum(index, last)
    out = matched_ptr + batch * n + rows
    tl.store(out, index.to(tl.int64), mask=(rows < n) & (index >= 0))
