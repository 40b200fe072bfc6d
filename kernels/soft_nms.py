"""Soft non-maximum suppression (Bodla et al., 2017), as its sequential definition has it.

    repeat   take the box of the highest current score, the first of equals
             s_i <- s_i exp(-IoU^2 / sigma)                              "gaussian"
             s_i <- s_i (1 - IoU)  or  0,  where IoU > threshold         "linear", "hard"

A program takes a segment (an image, or a class of one). Its lanes hold a box each; where there are
more boxes than lanes, each lane holds the best of its own. A selection is a maximum over the lanes
in registers. Scores only fall, so that it is the maximum of all as long as it is above T, the
highest score outside of the registers when these were filled. Then a sweep brings all scores up to
date: the boxes selected in between act on every box, in the order of their selection, so that its
score is the product that the definition has, rounded alike. With n boxes in 1,024 lanes there are
some 40 selections from one sweep to the next.

The state of a box is its score, at least 0, and minus its score once it was selected.

Instructions per selection and warp on sm_90, fp32, 1,024 boxes in 8 warps: about 150.
"""

import triton
import triton.language as tl

from ._math import div_rn
from ._nms import read_boxes, segment_length, starts_segment


@triton.jit
def _decayed(
    score, pivot, box, threshold, METHOD: tl.constexpr, SIGMA: tl.constexpr, OFFSET: tl.constexpr
):
    """Scores [I] after the selection of pivot, a box [1]."""
    px1, py1, px2, py2, p_area = pivot
    x1, y1, x2, y2, area = box
    w = tl.minimum(px2, x2) - tl.maximum(px1, x1)
    h = tl.minimum(py2, y2) - tl.maximum(py1, y1)
    if OFFSET != 0:
        w += OFFSET
        h += OFFSET
    least = 0.0
    if METHOD != "gaussian":
        # 0 divides slowly. With this width, and at most the pivot's height, an IoU is no more than
        # a third of the threshold.
        least = tl.maximum((px2 - px1) * (threshold * 0.25), 0.0)
    # Where h < 0 this is not above 0 either, and the union is.
    inter = tl.maximum(w, least) * h
    union = p_area + area - inter
    if METHOD == "gaussian":
        # The default maximum drops a NaN: what has no IoU keeps its score.
        iou = tl.maximum(inter / union, 0.0)
        if score.dtype == tl.float64:
            return score * tl.exp(iou * iou * (-1 / SIGMA))
        else:
            return score * tl.exp2(iou * iou * (-1.4426950408889634 / SIGMA))
    else:
        iou = div_rn(inter, union)
        if METHOD == "linear":
            return tl.fma(tl.where(iou > threshold, -iou, 0.0), score, score)
        else:
            return tl.where(iou > threshold, 0.0, score)


@triton.jit
def _highest(score):
    """The maximum of scores of at least 0; as integers fp32 has it in fewer instructions."""
    if score.dtype == tl.float64:
        return tl.max(score, axis=0)
    else:
        return tl.max(score.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _sweep(
    boxes_ptr, state_ptr, order_ptr, picks_ptr, n, swept, picked, threshold,
    METHOD: tl.constexpr, SIGMA: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Let the picks since the last sweep act on all scores.

    Returns for each lane its best score and where that is in the segment, and the highest score of
    all the others.
    """
    lane = tl.arange(0, SIZE)
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    best = tl.zeros((SIZE,), dtype)
    second = tl.zeros((SIZE,), dtype)
    best_at = lane
    for first in range(0, n, SIZE):
        at = first + lane
        inside = at < n
        index = at
        if order_ptr is not None:
            index = tl.load(order_ptr + at, mask=inside, other=0)
        state = tl.load(state_ptr + index, mask=inside, other=0)
        if picks_ptr is not None:  # noqa: SIM102, for the compiler
            if picked > swept:
                box = read_boxes(boxes_ptr, index, inside, OFFSET)
                score = tl.maximum(state, 0.0)
                for pick in range(swept, picked):
                    chosen = tl.load(picks_ptr + pick + tl.arange(0, 1))
                    pivot = read_boxes(boxes_ptr, chosen, None, OFFSET)
                    score = _decayed(score, pivot, box, threshold, METHOD, SIGMA, OFFSET)
                state = tl.where(state > 0, score, state)
                tl.store(state_ptr + index, state, mask=inside)
        second = tl.maximum(second, tl.minimum(best, state))
        best_at = tl.where(state > best, at, best_at)
        best = tl.maximum(best, state)
    return best, best_at, _highest(second)


@triton.jit
def _soften(
    boxes_ptr, state_ptr, order_ptr, picks_ptr, n, limit, threshold, score_threshold,
    METHOD: tl.constexpr, SIGMA: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Select up to limit boxes of a segment of n."""
    picked = 0
    swept = 0
    more = n > 0
    while more:
        score, at, rest = _sweep(
            boxes_ptr, state_ptr, order_ptr, picks_ptr, n, swept, picked, threshold,
            METHOD, SIGMA, OFFSET, SIZE,
        )  # fmt: skip
        swept = picked
        # A selection writes what a thread of the sweep may have written.
        tl.debug_barrier()
        index = at
        if order_ptr is not None:
            index = tl.load(order_ptr + at, mask=at < n, other=0)
        box = read_boxes(boxes_ptr, index, at < n, OFFSET)
        top = _highest(score)
        # The first is the best of all, be it only the first of equals.
        is_best = top > score_threshold
        least = tl.maximum(rest, score_threshold)
        while is_best & (picked < limit):
            winner = tl.min(tl.where(score == top, index, 0x7FFFFFFF), axis=0)
            tl.store(state_ptr + winner, -top)
            if picks_ptr is not None:
                tl.store(picks_ptr + picked, winner)
            pivot = read_boxes(boxes_ptr, winner + tl.arange(0, 1), None, OFFSET)
            score = _decayed(score, pivot, box, threshold, METHOD, SIGMA, OFFSET)
            score = tl.where(index == winner, 0.0, score)
            picked += 1
            top = _highest(score)
            is_best = top > least
        more = (picked < limit) & (tl.maximum(top, rest) > score_threshold)
        # What this program stored is loaded by its other threads.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "limit"])
def soft_nms_kernel(
    boxes_ptr,  # [B, n, 4]
    state_ptr,  # [B, n] fp32 | fp64: the scores, 0 for a box that takes no part; see above
    ids_ptr,  # [B, n], sorted; or None: an image is one segment
    order_ptr,  # [B, n] int32: by id, then by index; or None with ids_ptr
    picks_ptr,  # [B, n] int32, for its own use; or None, if no segment is longer than SIZE
    n,
    limit,  # boxes to select of a segment
    threshold,
    score_threshold,
    METHOD: tl.constexpr,  # "gaussian", "linear" or "hard"
    SIGMA: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program takes the segments that start in one chunk of one image."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = 1
    if ids_ptr is not None:
        chunks = tl.cdiv(n, CHUNK)
    base = pid // chunks * n
    at = (pid % chunks).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    ids = None if ids_ptr is None else ids_ptr + base
    starts = starts_segment(ids, at, n)
    start = tl.min(tl.where(starts, at, n), axis=0)
    while start < n:
        order = None if order_ptr is None else order_ptr + base + start
        picks = None if picks_ptr is None else picks_ptr + base + start
        _soften(
            boxes_ptr + base * 4, state_ptr + base, order, picks,
            segment_length(ids, None, start, n, SIZE), limit, threshold, score_threshold,
            METHOD, SIGMA, OFFSET, SIZE,
        )  # fmt: skip
        start = tl.min(tl.where(starts & (at > start), at, n), axis=0)
