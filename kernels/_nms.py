"""What the kernels of NMS share: exact decisions without division, and the greedy choice.

The decision is that of IEEE arithmetic in the order of `kernels/iou.py`,  fl(I / U) > t  with
U = A_j + A_i - I,  but without its division. Let h be half a unit in the last place of t. No
quotient of two numbers of 24 bits is a number of 25, so fl(I / U) > t means I - t U > h U. Where
the two are near each other, both are multiples of ulp(t) ulp(U) / 2 of at most 25 bits, so two
fused multiply-adds give the sign of  (I - t U) - h U  without error, if nothing underflows. Where
it could, in a block with areas below 2^-100 / t or for t < 2^-100, powers of two keep it up.
fp64 boxes are few and divide.

I > 0 needs two boxes of positive sides, and then U >= I in rounded arithmetic too. So the sign of
an area may be dropped, and of w and h it is enough to clamp one. Boxes with a NaN have a NaN area,
and what is NaN is not above a threshold: they suppress nothing, nor are suppressed.
"""

import triton
import triton.language as tl

from ._math import box_area


@triton.jit
def read_boxes(boxes_ptr, index, mask, OFFSET: tl.constexpr):
    """Corners and area, in the dtype of the arithmetic. 16 bytes a load."""
    ACC: tl.constexpr = tl.float64 if boxes_ptr.dtype.element_ty == tl.float64 else tl.float32
    at = boxes_ptr + (index.to(tl.int64) * 4)[:, None] + tl.arange(0, 4)[None, :]
    if mask is None:
        corners = tl.load(at).to(ACC)
    else:
        corners = tl.load(at, mask=mask[:, None], other=0).to(ACC)
    x, y = tl.split(tl.reshape(corners, (index.shape[0], 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2, tl.abs(box_area(x1, y1, x2, y2, OFFSET))


@triton.jit
def write_boxes(boxes_ptr, index, mask, box):
    """Corners as `read_boxes` returns them, by 16 bytes."""
    x1, y1, x2, y2, _ = box
    corners = tl.join(tl.join(x1, x2), tl.join(y1, y2))
    at = boxes_ptr + (index.to(tl.int64) * 4)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(at, tl.reshape(corners, (index.shape[0], 4)), mask=mask[:, None])


@triton.jit
def decision(threshold):
    """What `excess` needs of an fp32 threshold t.

    Returns t and h; the area below which a box is tiny; and the sums of areas below which a tiny
    box has its I, and its U, scaled up by 2^100. For t < 2^-100 every box is tiny, t and h are
    scaled instead of U; every box, that is, but those of area 0, inf or NaN, which decide nothing.
    If t is subnormal, its lowest bit set, a quotient half way is rounded up.
    """
    threshold = tl.cast(threshold, tl.float32)  # in the interpreter it is a Python number
    bits = threshold.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    is_small = exponent < 27
    half = (tl.maximum(exponent, 1) - 24 + tl.where(is_small, 100, 0)) << 23
    half = tl.where((exponent == 0) & ((bits & 1) == 1), half - 1, half)
    tiny = tl.where(is_small, 255, 154 - exponent) << 23
    scaled = tl.where(is_small, 255, 156 - exponent) << 23
    scaled_union = tl.where(is_small, 0, scaled)
    threshold = tl.where(is_small, threshold * 1.2676506002282294e30, threshold)
    return (
        threshold,
        half.to(tl.float32, bitcast=True),
        tiny.to(tl.float32, bitcast=True),
        scaled.to(tl.float32, bitcast=True),
        scaled_union.to(tl.float32, bitcast=True),
    )


@triton.jit
def has_tiny(box, decision):
    """Is any box so small that products of areas may underflow?"""
    area = box[4]
    return tl.max(((area > 0) & (area < decision[2])).to(tl.int32), axis=0) > 0


@triton.jit
def excess(j, i, threshold, decision, OFFSET: tl.constexpr, TINY: tl.constexpr):
    """[J, I]: above 0 where box j overlaps box i by more than the threshold."""
    jx1, jy1, jx2, jy2, j_area = j
    ix1, iy1, ix2, iy2, i_area = i
    w = tl.minimum(jx2[:, None], ix2[None, :]) - tl.maximum(jx1[:, None], ix1[None, :])
    h = tl.minimum(jy2[:, None], iy2[None, :]) - tl.maximum(jy1[:, None], iy1[None, :])
    if OFFSET != 0:
        w += OFFSET
        h += OFFSET
    inter = tl.maximum(w, 0.0) * h
    areas = j_area[:, None] + i_area[None, :]
    union = areas - inter
    if w.dtype == tl.float64:
        return tl.where(inter / union > threshold, 1.0, 0.0)
    else:
        t, half, _, scaled, scaled_union = decision
        if TINY:
            inter *= tl.where(areas < scaled, 1.2676506002282294e30, 1.0)
            union *= tl.where(areas < scaled_union, 1.2676506002282294e30, 1.0)
        return tl.fma(-half, union, tl.fma(-t, union, inter))


@triton.jit
def _excess_of(
    boxes_ptr, ids_ptr, list_ptr, row, n, i, i_id, threshold, decision,
    OFFSET: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """[J, I]: above 0 where box row[j], of n, strikes out box i. Only ids are found by the list."""
    over = excess(read_boxes(boxes_ptr, row, None, OFFSET), i, threshold, decision, OFFSET, TINY)
    if ids_ptr is not None:
        row_id = tl.load(ids_ptr + tl.load(list_ptr + tl.minimum(row, n - 1)))
        over = tl.where(row_id[:, None] == i_id[None, :], over, 0.0)
    return over


@triton.jit
def struck(
    boxes_ptr, ids_ptr, list_ptr, n, i, i_id, threshold, decision,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """[I]: above 0 where any of the first n boxes strikes out box i."""
    worst = i[4] * 0
    for first in range(0, n, ROWS):
        # The last box may strike more than once, so nothing needs a mask.
        row = tl.minimum(first + tl.arange(0, ROWS), n - 1)
        over = _excess_of(
            boxes_ptr, ids_ptr, list_ptr, row, n, i, i_id, threshold, decision, OFFSET, TINY
        )
        # The default drops a NaN.
        worst = tl.maximum(worst, tl.max(over, axis=0))
    return worst


@triton.jit
def relation(
    boxes_ptr, ids_ptr, list_ptr, n, i, i_id, threshold, decision,
    OFFSET: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """[BLOCK / 32, BLOCK]: bit b of word w of box i: does box 32 w + b strike i, that comes later?

    What is read beyond the n boxes, up to the end of a word, strikes none of them.
    """
    word = tl.arange(0, BLOCK // 32)
    lane = tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK // 32, BLOCK), tl.int32)
    for w in range(tl.cdiv(n, 32)):
        of_word = tl.zeros((BLOCK,), tl.int32)
        rows = 32
        if TINY:  # rare code stays short
            rows = tl.minimum(n - w * 32, 32)
        for first in range(0, rows, ROWS):
            row = w * 32 + first + tl.arange(0, ROWS)
            over = _excess_of(
                boxes_ptr, ids_ptr, list_ptr, row, n, i, i_id, threshold, decision, OFFSET, TINY
            )
            of_word |= packed(over > 0, ROWS) << first
        of_word &= bits_before(lane - w * 32)
        bits = tl.where(word[:, None] == w, of_word[None, :], bits)
    return bits


@triton.jit
def bits_before(position):
    """The lowest bits of a word, as many as position says; none below 0, all above 31."""
    some = (1 << tl.minimum(tl.maximum(position, 0), 31)) - 1
    return tl.where(position > 31, -1, some)


@triton.jit
def packed(hit, ROWS: tl.constexpr):
    """[ROWS, I] -> [I]: row r as bit r. Every row has a bit of its own, so the sum is the union."""
    return tl.sum(hit.to(tl.int32) << tl.arange(0, ROWS)[:, None], axis=0)


@triton.jit
def pack(keep, BLOCK: tl.constexpr):
    """[BLOCK] of 0 and 1 -> [BLOCK / 32] words."""
    lanes = tl.reshape(keep, (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    return tl.sum(lanes, axis=1)


@triton.jit
def any_kept(bits, kept):
    """[I]: is any suppressor of box i kept? bits [W, I], kept [W]."""
    return tl.max(((bits & kept[:, None]) != 0).to(tl.int32), axis=0)


@triton.jit
def fixed_point(bits, alive, BLOCK: tl.constexpr):
    """[BLOCK] of 0 and 1: the greedy choice. bits [BLOCK / 32, BLOCK], alive [BLOCK]."""
    keep = alive
    changed = 1
    rounds = 0
    # A bound that sound bits never reach, so that no memory fault can hang the GPU.
    while (changed > 0) & (rounds <= BLOCK):
        after = tl.where(any_kept(bits, pack(keep, BLOCK)) == 0, alive, 0)
        changed = tl.max(after ^ keep, axis=0)
        keep = after
        rounds += 1
    return keep


@triton.jit
def starts_segment(ids_ptr, at, n):
    """Which positions have another id than the one before; without ids only the first."""
    if ids_ptr is None:
        return (at == 0) & (at < n)
    else:
        own = tl.load(ids_ptr + at, mask=at < n, other=0)
        before = tl.load(ids_ptr + at - 1, mask=(at > 0) & (at < n), other=0)
        return (at < n) & ((at == 0) | (own != before))


@triton.jit
def segment_length(ids_ptr, alive_ptr, start, n, BLOCK: tl.constexpr):
    """How many boxes from start on have its id and are alive."""
    length = 0
    more = 1
    while more > 0:
        at = start + length + tl.arange(0, BLOCK)
        same = at < n
        if ids_ptr is not None:
            own = tl.load(ids_ptr + start)
            same = same & (tl.load(ids_ptr + at, mask=at < n, other=0) == own)
        if alive_ptr is not None:
            same = same & (tl.load(alive_ptr + at, mask=at < n, other=0) != 0)
        found = tl.sum(same.to(tl.int32), axis=0)
        length += found
        more = tl.where(found == BLOCK, 1, 0)
    return length
