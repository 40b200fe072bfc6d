"""Greedy non-maximum suppression in bounded memory, with exact IoU decisions.

Boxes come sorted by score. They are taken in bands of a few thousand. In each band

1. `nms_mask_kernel` writes, for 32 earlier boxes j at a time, a word per box i whose bit says
   that j would suppress i:  bit = (j < i) & (id_j == id_i) & (I / (A_j + A_i - I) > threshold),
2. `nms_resolve_kernel`, one program, finds which boxes are kept,
3. `nms_suppress_kernel` lets the kept boxes strike out the boxes of all later bands.

So memory is one band's bitmask (BAND^2 / 8 bytes) and a byte per box, for any number of boxes.

The greedy choice inside a block is the fixed point of  keep_i = alive_i & not any_j(keep_j &
bit_ji):  j < i makes the relation triangular, so after r rounds the first r boxes are final; real
sets need a handful of rounds, and none needs more than the block has boxes.

The decision is IEEE arithmetic in the order of `kernels/iou.py`: no fused multiply-add, rounded
division. A NaN area or IoU compares false and suppresses nothing.

Instructions per pair on sm_90, fp32: about 37, most of them the division.
"""

import triton
import triton.language as tl

from ._math import box_area, box_overlap, div_rn, nan_max


@triton.jit
def _load_boxes(boxes_ptr, ids_ptr, index, mask, OFFSET: tl.constexpr, ACC: tl.constexpr):
    p = boxes_ptr + index * 4
    x1 = tl.load(p, mask=mask, other=0).to(ACC)
    y1 = tl.load(p + 1, mask=mask, other=0).to(ACC)
    x2 = tl.load(p + 2, mask=mask, other=0).to(ACC)
    y2 = tl.load(p + 3, mask=mask, other=0).to(ACC)
    if ids_ptr is None:
        ids = tl.zeros(index.shape, tl.int32)
    else:
        ids = tl.load(ids_ptr + index, mask=mask, other=0)
    return x1, y1, x2, y2, box_area(x1, y1, x2, y2, OFFSET), ids


@triton.jit
def _suppresses(j, i, threshold, OFFSET: tl.constexpr, HAS_IDS: tl.constexpr):
    """[J, I]: does box j overlap box i of the same id by more than the threshold?"""
    jx1, jy1, jx2, jy2, j_area, j_id = j
    ix1, iy1, ix2, iy2, i_area, i_id = i
    w, h = box_overlap(
        jx1[:, None], jy1[:, None], jx2[:, None], jy2[:, None],
        ix1[None, :], iy1[None, :], ix2[None, :], iy2[None, :], OFFSET,
    )  # fmt: skip
    inter = nan_max(w, 0.0) * nan_max(h, 0.0)
    hit = div_rn(inter, j_area[:, None] + i_area[None, :] - inter) > threshold
    if HAS_IDS:
        hit = hit & (j_id[:, None] == i_id[None, :])
    return hit


@triton.jit
def nms_mask_kernel(
    boxes_ptr,  # [N, 4], sorted by score
    ids_ptr,  # [N] or None
    mask_ptr,  # [words, stride] int32: bit b of [w, i] says that box 32 w + b suppresses i
    start,  # first box of the band
    size,  # boxes in the band
    stride,  # a multiple of BLOCK: rows are padded, so that nothing needs a mask along them
    threshold,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program writes one row of words for BLOCK boxes, ROWS suppressors at a time."""
    ACC: tl.constexpr = tl.float64 if boxes_ptr.dtype.element_ty == tl.float64 else tl.float32
    word = tl.program_id(1)
    # Words that lie wholly after the block are never read.
    if word * 32 < (tl.program_id(0) + 1) * BLOCK:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        begin = start.to(tl.int64)
        box_i = _load_boxes(boxes_ptr, ids_ptr, begin + i, i < size, OFFSET, ACC)
        bits = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, 32, ROWS):
            lane = first + tl.arange(0, ROWS)
            j = word * 32 + lane
            box_j = _load_boxes(boxes_ptr, ids_ptr, begin + j, j < size, OFFSET, ACC)
            hit = _suppresses(box_j, box_i, threshold, OFFSET, ids_ptr is not None)
            hit = hit & (j[:, None] < i[None, :])
            # Every row sets a bit of its own, so the sum is the union.
            bits += tl.sum(hit.to(tl.int32) << lane[:, None], axis=0)
        tl.store(mask_ptr + word.to(tl.int64) * stride + i, bits)


@triton.jit
def _pack(keep, BLOCK: tl.constexpr):
    """[BLOCK] of 0 and 1 -> [BLOCK / 32] words."""
    lanes = tl.reshape(keep, (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    return tl.sum(lanes, axis=1)


@triton.jit
def _struck(bits, kept):
    """[I]: is any suppressor of box i kept? bits [W, I], kept [W]."""
    return tl.max(((bits & kept[:, None]) != 0).to(tl.int32), axis=0)


@triton.jit
def nms_resolve_kernel(
    mask_ptr,  # [words, stride] int32
    keep_ptr,  # [N] int8: in, may still be kept; out, is kept
    kept_ptr,  # [words] int32: the band's kept boxes, packed
    start,
    size,
    stride,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program walks the band in blocks of BLOCK boxes."""
    NEAR: tl.constexpr = BLOCK // 32
    begin = start.to(tl.int64)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        alive = tl.load(keep_ptr + begin + i, mask=i < size, other=0).to(tl.int32)
        struck = tl.zeros((BLOCK,), tl.int32)
        for far in range(0, first // 32, WORDS):
            word = far + tl.arange(0, WORDS)
            ok = word < first // 32
            kept = tl.load(kept_ptr + word, mask=ok, other=0)
            at = word.to(tl.int64)[:, None] * stride + i[None, :]
            bits = tl.load(mask_ptr + at, mask=ok[:, None], other=0)
            struck = tl.maximum(struck, _struck(bits, kept))
        alive = tl.where(struck == 0, alive, 0)

        word = first // 32 + tl.arange(0, NEAR)
        at = word.to(tl.int64)[:, None] * stride + i[None, :]
        bits = tl.load(mask_ptr + at, mask=(word * 32 < size)[:, None], other=0)
        keep = alive
        changed = 1
        rounds = 0
        # A bound that sound bits never reach, so that no memory fault can hang the GPU.
        while (changed > 0) & (rounds <= BLOCK):
            after = tl.where(_struck(bits, _pack(keep, BLOCK)) == 0, alive, 0)
            changed = tl.max(after ^ keep, axis=0)
            keep = after
            rounds += 1
        tl.store(keep_ptr + begin + i, keep.to(tl.int8), mask=i < size)
        tl.store(kept_ptr + word, _pack(keep, BLOCK), mask=word * 32 < size)
        # The next block reads kept_ptr, written here by other threads of this program.
        tl.debug_barrier()


@triton.jit
def nms_suppress_kernel(
    boxes_ptr,
    ids_ptr,
    keep_ptr,  # [N] int8, set to 0 where a kept box of the band suppresses
    kept_ptr,  # [words] int32
    start,
    end,  # of the band; the boxes struck out lie from here on
    n,
    threshold,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program lets WORDS words of the band's kept boxes act on BLOCK later boxes.

    Programs that share a box only ever write the same 0, so their order does not matter.
    """
    ACC: tl.constexpr = tl.float64 if boxes_ptr.dtype.element_ty == tl.float64 else tl.float32
    i = end + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    box_i = _load_boxes(boxes_ptr, ids_ptr, i, i < n, OFFSET, ACC)
    struck = tl.zeros((BLOCK,), tl.int32)
    words = tl.cdiv(end - start, 32)
    first = tl.program_id(1) * WORDS
    for word in range(first, tl.minimum(first + WORDS, words)):
        kept = tl.load(kept_ptr + word)
        if kept != 0:
            for row in range(0, 32, ROWS):
                lane = row + tl.arange(0, ROWS)
                is_kept = ((kept >> lane) & 1) != 0
                j = start.to(tl.int64) + word * 32 + lane
                box_j = _load_boxes(boxes_ptr, ids_ptr, j, is_kept, OFFSET, ACC)
                hit = _suppresses(box_j, box_i, threshold, OFFSET, ids_ptr is not None)
                hit = hit & is_kept[:, None]
                struck = tl.maximum(struck, tl.max(hit.to(tl.int32), axis=0))
    tl.store(keep_ptr + i, tl.zeros((BLOCK,), tl.int8), mask=(i < n) & (struck > 0))
