"""Greedy non-maximum suppression with exact IoU decisions, in three tiers.

1. One program per segment (an image, or a class of one): `nms_small_kernel` sorts a small image
   itself, `nms_segments_kernel` takes what is sorted already. The boxes come in blocks, best first;
   a block is compared with the list of kept boxes, then with itself.
2. A band of all boxes: `nms_mask_kernel` writes, for 32 boxes j at a time, a word per box i whose
   bit says that j comes before i and overlaps it by more than the threshold; `nms_resolve_kernel`,
   one program, finds which boxes are kept.
3. Several bands, so that memory is linear: between two of them `nms_suppress_kernel` lets the kept
   boxes of the one strike out boxes of all later ones.

The greedy choice inside a block is the fixed point of  keep_i = alive_i & not any_j(keep_j &
bit_ji):  j < i makes the relation triangular, so after r rounds the first r boxes are final; real
sets need a handful of rounds, and none needs more than the block has boxes.

Numbers of boxes vary from call to call, and are not what a kernel is compiled for.

How two boxes are compared is in `_nms.py`. Suppressors lie in a row, in the order in which they are
read, so that finding one costs nothing. Instructions per pair on sm_90, fp32: 13 are needed, and a
share of loading box j and its area; 15.5 to 18 with all around them.
"""

import triton
import triton.language as tl

from ._nms import (
    any_kept,
    bits_before,
    decision,
    excess,
    fixed_point,
    has_tiny,
    pack,
    packed,
    read_boxes,
    relation,
    segment_length,
    starts_segment,
    struck,
    write_boxes,
)


@triton.jit
def _choose(
    boxes_ptr, ids_ptr, list_ptr, row_ptr, n, limit, threshold,
    OFFSET: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Reduce a list of n boxes, best first, to those kept, at most limit. Returns their number.

    List and boxes in a row are written over from the front: no more are kept than have been read.
    """
    deciding = decision(threshold)
    kept = 0
    first = 0
    while (first < n) & (kept < limit):
        lane = tl.arange(0, BLOCK)
        inside = first + lane < n
        i = tl.load(list_ptr + first + lane, mask=inside, other=0)
        box_i = read_boxes(boxes_ptr, i, inside, OFFSET)
        i_id = i
        if ids_ptr is not None:
            i_id = tl.load(ids_ptr + i, mask=inside, other=0)
        # A row of boxes is read by all threads, and needs no look at the list.
        write_boxes(row_ptr, first + lane, inside, box_i)
        tl.debug_barrier()
        here = tl.minimum(n - first, BLOCK)
        here_ptr = row_ptr + first * 4
        ids_here_ptr = list_ptr + first
        if has_tiny(box_i, deciding):
            worst = struck(
                row_ptr, ids_ptr, list_ptr, kept, box_i, i_id, threshold, deciding,
                OFFSET, 1, True,
            )  # fmt: skip
            bits = relation(
                here_ptr, ids_ptr, ids_here_ptr, here, box_i, i_id, threshold, deciding,
                OFFSET, BLOCK, 1, True,
            )  # fmt: skip
        else:
            worst = struck(
                row_ptr, ids_ptr, list_ptr, kept, box_i, i_id, threshold, deciding,
                OFFSET, ROWS, False,
            )  # fmt: skip
            bits = relation(
                here_ptr, ids_ptr, ids_here_ptr, here, box_i, i_id, threshold, deciding,
                OFFSET, BLOCK, ROWS, False,
            )  # fmt: skip
        alive = tl.where(worst > 0, 0, inside.to(tl.int32))
        keep = fixed_point(bits, alive, BLOCK)
        at = kept + tl.cumsum(keep, axis=0) - keep
        keep = tl.where(at < limit, keep, 0)
        # Other threads may still be reading where it is now written, and vice versa.
        tl.debug_barrier()
        tl.store(list_ptr + at, i, mask=keep > 0)
        write_boxes(row_ptr, at, keep > 0, box_i)
        tl.debug_barrier()
        kept += tl.sum(keep, axis=0)
        first += BLOCK
    return kept


@triton.jit
def _descending(score):
    """An int32 that rises as the score falls; both zeros are the same, a NaN comes last."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score == score, -1 - rising, 0x7FFFFFFF)


@triton.jit(do_not_specialize=["n", "max_output"])
def nms_small_kernel(
    boxes_ptr,  # [B, n, 4]
    scores_ptr,  # [B, n]
    ids_ptr,  # [B, n], or None
    valid_ptr,  # [B] boxes that count, the first ones; or None
    order_ptr,  # [B, n] int64, for its own use
    row_ptr,  # [B, n + 31, 4], for its own use, in the dtype of the arithmetic
    indices_ptr,  # [B, max_output] int64: the kept boxes, best first, then -1
    counts_ptr,  # [B] int32
    n,  # at most SIZE
    max_output,
    threshold,
    score_threshold,  # or None
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program sorts one image and chooses its boxes."""
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    size = n
    if valid_ptr is not None:
        size = tl.maximum(tl.minimum(tl.load(valid_ptr + image), n), 0).to(tl.int32)
    takes_part = lane < size
    score = tl.load(scores_ptr + image * n + lane, mask=takes_part, other=0).to(tl.float32)
    if score_threshold is not None:
        takes_part = takes_part & (score > score_threshold)
    key = (_descending(score).to(tl.int64) << 32) | lane
    key = tl.sort(tl.where(takes_part, key, 0x7FFFFFFFFFFFFFFF))
    size = tl.sum(takes_part.to(tl.int32), axis=0)
    list_ptr = order_ptr + image * n
    tl.store(list_ptr + lane, key & 0xFFFFFFFF, mask=lane < size)
    tl.debug_barrier()
    ids = None if ids_ptr is None else ids_ptr + image * n
    limit = tl.minimum(max_output, n)
    kept = _choose(
        boxes_ptr + image * n * 4, ids, list_ptr, row_ptr + image * (n + 31) * 4, size, limit,
        threshold, OFFSET, BLOCK, ROWS,
    )  # fmt: skip
    for first in range(0, max_output, BLOCK):
        at = first + tl.arange(0, BLOCK)
        index = tl.load(list_ptr + at, mask=at < kept, other=-1)
        tl.store(indices_ptr + image * max_output + at, index, mask=at < max_output)
    tl.store(counts_ptr + image, kept)


@triton.jit(do_not_specialize=["n", "chunks", "limit", "largest"])
def nms_segments_kernel(
    boxes_ptr,  # [B, n, 4]
    ids_ptr,  # [B, n], sorted; or None: an image is one segment
    order_ptr,  # [B, n] int64: by id, then best first. Overwritten
    row_ptr,  # [B n + 31, 4], for its own use, in the dtype of the arithmetic
    alive_ptr,  # [B, n] int8 in that order, 0 from where on a segment takes no part; or None
    keep_ptr,  # [B, n] int8: 1 is written for the boxes kept, by index
    large_ptr,  # [1] int32: 1 is written if a segment is too large, which is then left alone
    n,
    chunks,  # of CHUNK boxes in an image
    limit,  # boxes to keep of a segment
    largest,  # segment
    threshold,
    OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program takes the segments that start in one chunk of one image."""
    pid = tl.program_id(0).to(tl.int64)
    base = pid // chunks * n
    at = (pid % chunks).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    ids = None if ids_ptr is None else ids_ptr + base
    alive = None if alive_ptr is None else alive_ptr + base
    starts = starts_segment(ids, at, n)
    start = tl.min(tl.where(starts, at, n), axis=0)
    while start < n:
        length = segment_length(ids, alive, start, n, BLOCK)
        if length > largest:
            tl.store(large_ptr, 1)
        else:
            list_ptr = order_ptr + base + start
            kept = _choose(
                boxes_ptr + base * 4, None, list_ptr, row_ptr + (base + start) * 4, length, limit,
                threshold, OFFSET, BLOCK, ROWS,
            )  # fmt: skip
            for first in range(0, kept, BLOCK):
                row = first + tl.arange(0, BLOCK)
                index = tl.load(list_ptr + row, mask=row < kept, other=0)
                tl.store(keep_ptr + base + index, tl.full((BLOCK,), 1, tl.int8), mask=row < kept)
        start = tl.min(tl.where(starts & (at > start), at, n), axis=0)


@triton.jit(do_not_specialize=["n", "blocks", "max_output"])
def nms_list_kernel(
    order_ptr,  # [B, n] int64, best first
    keep_ptr,  # [B, n] int8, in that order
    rank_ptr,  # [B, n] int32: running sums of keep
    indices_ptr,  # [B, max_output] int64, full of -1
    counts_ptr,  # [B] int32
    n,
    blocks,  # of an image
    max_output,
    BLOCK: tl.constexpr,
):
    """One program lists what is kept of one block of one image."""
    pid = tl.program_id(0).to(tl.int64)
    image = pid // blocks
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(keep_ptr + image * n + at, mask=at < n, other=0) != 0
    rank = tl.load(rank_ptr + image * n + at, mask=at < n, other=0)
    index = tl.load(order_ptr + image * n + at, mask=kept, other=0)
    out_ptr = indices_ptr + image * max_output + rank - 1
    tl.store(out_ptr, index, mask=kept & (rank <= max_output))
    tl.store(counts_ptr + image + at * 0, tl.minimum(rank, max_output), mask=at == n - 1)


@triton.jit(do_not_specialize=["start", "size"])
def nms_mask_kernel(
    boxes_ptr,  # [n, 4], best first
    mask_ptr,  # [words, stride] int32: bit b of [w, i] says that box 32 w + b strikes out i
    start,  # first box of the band
    size,  # boxes in the band
    stride,  # a multiple of BLOCK: rows are padded, so that nothing needs a mask along them
    threshold,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program writes one row of words for BLOCK boxes, ROWS suppressors at a time."""
    word = tl.program_id(1)
    # Words that lie wholly after the block are never read.
    if word * 32 < (tl.program_id(0) + 1) * BLOCK:
        deciding = decision(threshold)
        lane = tl.arange(0, BLOCK)
        i = tl.program_id(0) * BLOCK + lane
        band_ptr = boxes_ptr + start.to(tl.int64) * 4
        box_i = read_boxes(band_ptr, i, i < size, OFFSET)
        bits = tl.zeros((BLOCK,), tl.int32)
        if has_tiny(box_i, deciding):
            for first in range(32):
                row = tl.minimum(word * 32 + first + tl.arange(0, 1), size - 1)
                box_j = read_boxes(band_ptr, row, None, OFFSET)
                hit = excess(box_j, box_i, threshold, deciding, OFFSET, True) > 0
                bits |= packed(hit, 1) << first
        else:
            for first in range(0, 32, ROWS):
                row = tl.minimum(word * 32 + first + tl.arange(0, ROWS), size - 1)
                box_j = read_boxes(band_ptr, row, None, OFFSET)
                hit = excess(box_j, box_i, threshold, deciding, OFFSET, False) > 0
                bits |= packed(hit, ROWS) << first
        bits &= bits_before(i - word * 32)
        tl.store(mask_ptr + word.to(tl.int64) * stride + i, bits)


@triton.jit(do_not_specialize=["start", "size"])
def nms_resolve_kernel(
    boxes_ptr,  # [n, 4], best first
    mask_ptr,  # [words, stride] int32
    keep_ptr,  # [n] int8: in, may still be kept; out, is kept
    kept_ptr,  # [words] int32: the band's kept boxes, packed
    row_ptr,  # [size, 4]: and in a row, in the dtype of the arithmetic; or None, if none is later
    count_ptr,  # [1] int32: their number
    start,
    size,
    stride,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program walks the band in blocks of BLOCK boxes."""
    NEAR: tl.constexpr = BLOCK // 32
    begin = start.to(tl.int64)
    count = 0
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
            struck = tl.maximum(struck, any_kept(bits, kept))
        alive = tl.where(struck == 0, alive, 0)

        word = first // 32 + tl.arange(0, NEAR)
        at = word.to(tl.int64)[:, None] * stride + i[None, :]
        bits = tl.load(mask_ptr + at, mask=(word * 32 < size)[:, None], other=0)
        keep = fixed_point(bits, alive, BLOCK)
        tl.store(keep_ptr + begin + i, keep.to(tl.int8), mask=i < size)
        tl.store(kept_ptr + word, pack(keep, BLOCK), mask=word * 32 < size)
        if row_ptr is not None:
            box = read_boxes(boxes_ptr + begin * 4, i, keep > 0, 0)
            write_boxes(row_ptr, count + tl.cumsum(keep, axis=0) - keep, keep > 0, box)
        count += tl.sum(keep, axis=0)
        # The next block reads kept_ptr, written here by other threads of this program.
        tl.debug_barrier()
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["end", "n"])
def nms_suppress_kernel(
    boxes_ptr,  # [n, 4], best first
    keep_ptr,  # [n] int8, set to 0 where a kept box of the band overlaps enough
    row_ptr,  # [size, 4]: the band's kept boxes
    count_ptr,  # [1] int32: their number
    end,  # of the band; the boxes struck out lie from here on
    n,
    threshold,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """One program lets up to SHARE of the band's kept boxes act on BLOCK later boxes.

    Programs that share a box only ever write the same 0, so their order does not matter.
    """
    first = tl.program_id(1) * SHARE
    count = tl.minimum(tl.load(count_ptr) - first, SHARE)
    if count > 0:
        deciding = decision(threshold)
        later_ptr = boxes_ptr + end.to(tl.int64) * 4
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n - end
        box_i = read_boxes(later_ptr, i, inside, OFFSET)
        if has_tiny(box_i, deciding):
            worst = struck(
                row_ptr + first * 4, None, None, count, box_i, i, threshold, deciding,
                OFFSET, 1, True,
            )  # fmt: skip
        else:
            worst = struck(
                row_ptr + first * 4, None, None, count, box_i, i, threshold, deciding,
                OFFSET, ROWS, False,
            )  # fmt: skip
        tl.store(keep_ptr + end + i, tl.zeros((BLOCK,), tl.int8), mask=inside & (worst > 0))
