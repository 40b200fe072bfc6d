"""What the IoU family shares: hulls, penalties and their slopes. No loads, no stores.

A KIND takes a penalty from the IoU, of a pair with union U, whose hull (the smallest box that holds
both) has sides c_w, c_h and area C, and whose centres are d_x, d_y apart:

    giou   (C - U) / (C + eps)
    diou   (d_x^2 + d_y^2) / (c_w^2 + c_h^2 + eps)
    ciou   that, and alpha v: v = 4/pi^2 turn^2, alpha = v / (1 - iou + v + eps) without a gradient;
           turn is the difference of the angles atan(width / height)

A quotient is 0 where what is below is 0. Where the boxes share a side, min and max split the
gradient in halves, as torch does; what is the max of two is not their min, so that a coordinate's
share in the hull is 1 less its share in the overlap.
"""

import triton
import triton.language as tl

from ._math import nan_max, nan_min

# Of turn^2 in v.
_ROUND = tl.constexpr(0.4052847345693511)


@triton.jit
def hull(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, OFFSET: tl.constexpr):
    """Signed width and height of the smallest box that holds both."""
    w = nan_max(ax2, bx2) - nan_min(ax1, bx1)
    h = nan_max(ay2, by2) - nan_min(ay1, by1)
    if OFFSET == 0:
        return w, h
    else:
        return w + OFFSET, h + OFFSET


@triton.jit
def between_centres(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """From the centre of b to that of a. Differences first: they are exact where boxes are near."""
    return ((ax1 - bx1) + (ax2 - bx2)) * 0.5, ((ay1 - by1) + (ay2 - by2)) * 0.5


@triton.jit
def _ratio(above, below):
    return tl.where(below == 0, 0.0, above / below)


@triton.jit
def penalty(iou, union, c_w, c_h, d_x, d_y, turn, KIND: tl.constexpr, EPS: tl.constexpr):
    """What ``KIND`` takes from the IoU. ``turn`` is read for "ciou" only."""
    if KIND == "giou":
        return _ratio(c_w * c_h - union, c_w * c_h + EPS)
    else:
        taken = _ratio(d_x * d_x + d_y * d_y, c_w * c_w + c_h * c_h + EPS)
        if KIND == "ciou":
            v = turn * turn * _ROUND
            taken += _ratio(v * v, 1 - iou + v + EPS)
        return taken


@triton.jit
def slopes(
    g, ok, inter, union, c_w, c_h, d_x, d_y, turn,
    KIND: tl.constexpr, EPS_IOU: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The gradient of g (iou - penalty), iou = inter / (union + EPS_IOU), by its ingredients.

    By the intersection (the union's part of it included), by each area, by the hull's width and
    height, by each coordinate through the centres, in x and y, and by ``turn``. Not ``ok``, or
    without a value (NaN): all 0, for one bad box must not spoil others' sums.
    """
    below = union + EPS_IOU
    over = _ratio(1.0, below)
    iou = inter * over
    d_union = -g * iou * over
    d_turn = tl.zeros_like(g)
    if KIND == "giou":
        over_hull = _ratio(1.0, c_w * c_h + EPS)
        taken = (c_w * c_h - union) * over_hull
        d_union += g * over_hull
        d_hull = -g * over_hull * ((union + EPS) * over_hull)
        d_cw, d_ch = d_hull * c_h, d_hull * c_w
        d_cx, d_cy = d_turn, d_turn
    else:
        over_hull = _ratio(1.0, c_w * c_w + c_h * c_h + EPS)
        taken = (d_x * d_x + d_y * d_y) * over_hull
        d_cx, d_cy = -g * over_hull * d_x, -g * over_hull * d_y
        d_hull = 2 * g * over_hull * taken
        d_cw, d_ch = d_hull * c_w, d_hull * c_h
        if KIND == "ciou":
            v = turn * turn * _ROUND
            alpha = _ratio(v, 1 - iou + v + EPS)
            taken += alpha * v
            d_turn = -2 * _ROUND * g * alpha * turn
    d_inter = g * over - d_union
    ok = ok & (iou - taken == iou - taken)
    d_inter, d_union = tl.where(ok, d_inter, 0.0), tl.where(ok, d_union, 0.0)
    d_cw, d_ch = tl.where(ok, d_cw, 0.0), tl.where(ok, d_ch, 0.0)
    d_cx, d_cy = tl.where(ok, d_cx, 0.0), tl.where(ok, d_cy, 0.0)
    return d_inter, d_union, d_cw, d_ch, d_cx, d_cy, tl.where(ok, d_turn, 0.0)


@triton.jit
def share(inside, tie, ACC: tl.constexpr):
    """How much of a min or max is this operand: 1, 0, or half of a tie."""
    return tl.where(tie, 0.5, tl.where(inside, 1.0, 0.0)).to(ACC)


@triton.jit
def turned(d_angle, w, h):
    """The gradients of a box's width and height from that of its angle atan(w / h)."""
    # Selects: no gradient stays none where the sides are 0 or not finite.
    over = tl.where(d_angle == 0, 0.0, _ratio(d_angle, w * w + h * h))
    return tl.where(over == 0, 0.0, over * h), tl.where(over == 0, 0.0, -over * w)
