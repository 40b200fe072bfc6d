"""The IoU family of pairs of boxes, [..., 4] each, and its gradients, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

IGNORE: Any = {"divide": "ignore", "invalid": "ignore", "over": "ignore"}


class _Pair(NamedTuple):
    overlap: Array  # signed sides of the intersection, [..., 2]
    inter: Array
    union: Array  # with eps, if a loss
    iou: Array
    hull: Array  # sides, [..., 2]
    apart: Array  # of the centres, [..., 2]
    turn: Array  # difference of the angles
    below: Array  # what the penalty is divided by
    value: Array


def _quotient(above: Array, below: Array) -> Array:
    return np.where(below == 0, 0.0, above / below)


def _sides(boxes: Array, offset: int) -> Array:
    return boxes[..., 2:] - boxes[..., :2] + offset


def _angle(sides: Array) -> Array:
    """atan(width / height), 0 of a point."""
    point = (sides == 0).all(-1)
    return np.where(point, 0.0, np.arctan(sides[..., 0] / np.where(point, 1, sides[..., 1])))


def _alpha(pair_iou: Array, v: Array, eps: float) -> Array:
    return _quotient(v, 1 - pair_iou + v + eps)


def _v(turn: Array) -> Array:
    return 4 / np.pi**2 * turn**2


def _pair(a: Array, b: Array, kind: str, offset: int, eps: float, loss: bool) -> _Pair:
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + offset
    inter = np.maximum(overlap, 0).prod(-1)
    side_a, side_b = _sides(a, offset), _sides(b, offset)
    union = side_a.prod(-1) + side_b.prod(-1) - inter
    hull = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2]) + offset
    if not loss:
        hull = np.maximum(hull, 0)
    apart = ((a[..., 2:] + a[..., :2]) - (b[..., 2:] + b[..., :2])) / 2
    turn = _angle(side_a) - _angle(side_b)
    iou = _quotient(inter, union + eps * loss)
    if kind == "giou":
        below = hull.prod(-1) + eps
        value = iou - _quotient(hull.prod(-1) - union, below)
    else:
        below = (hull**2).sum(-1) + eps
        value = iou - _quotient((apart**2).sum(-1), below)
    if kind == "ciou":
        value = value - _alpha(iou, _v(turn), eps) * _v(turn)
    return _Pair(overlap, inter, union + eps * loss, iou, hull, apart, turn, below, value)


def similarity(
    a: Array, b: Array, kind: str, *, offset: int = 0, eps: float = 0.0, loss: bool = False
) -> Array:
    """GIoU, DIoU or CIoU of boxes that broadcast, [..., 4] with [..., 4].

    With ``loss`` as in torchvision's losses: eps is added to the union too, and the hull of two
    boxes that are inside out may have negative sides.
    """
    with np.errstate(**IGNORE):
        return _pair(a.astype(np.float64), b.astype(np.float64), kind, offset, eps, loss).value


def similarity_grad(
    a: Array,
    b: Array,
    grad: Array,
    kind: str,
    *,
    offset: int = 0,
    eps: float = 0.0,
    loss: bool = False,
) -> tuple[Array, Array]:
    """Gradients of ``sum(grad * similarity(...))`` by each pair's boxes, both [..., 4].

    None where the value is NaN. A loss passes none to an overlap of 0.
    """
    with np.errstate(**IGNORE):
        a, b, grad = (x.astype(np.float64) for x in (a, b, grad))
        p = _pair(a, b, kind, offset, eps, loss)
        d_iou = grad
        d_union = _quotient(-p.inter, p.union**2) * d_iou
        d_inter = _quotient(d_iou, p.union) - d_union
        d_apart = np.zeros_like(p.apart)
        if kind == "giou":
            # (C - U) / (C + eps) = 1 - (U + eps) / (C + eps)
            union = p.union + eps * (not loss)
            d_union = d_union + _quotient(grad, p.below)
            d_inter = d_inter - _quotient(grad, p.below)
            d_hull = _quotient(-grad * union, p.below**2)[..., None] * p.hull[..., ::-1]
        else:
            d_apart = -2 * _quotient(grad, p.below)[..., None] * p.apart
            square = _quotient(grad * (p.apart**2).sum(-1), p.below**2)
            d_hull = 2 * square[..., None] * p.hull
        overlapping = ((p.overlap > 0) | (p.overlap == 0) & (not loss)).all(-1, keepdims=True)
        d_overlap = np.where(
            overlapping, d_inter[..., None] * np.maximum(p.overlap, 0)[..., ::-1], 0
        )
        v = _v(p.turn)
        d_turn = -grad * _alpha(p.iou, v, eps) * 8 / np.pi**2 * p.turn
        defined = ~np.isnan(p.value)[..., None]
        gradients = []
        for own, other, sign in ((a, b, 1), (b, a, -1)):
            # torch's rule: the operand that is the min or max takes all, equal ones half each.
            low = 0.5 * (1 + np.sign(own[..., :2] - other[..., :2]))
            high = 0.5 * (1 - np.sign(own[..., 2:] - other[..., 2:]))
            sides = _sides(own, offset)
            d_sides = d_union[..., None] * sides[..., ::-1]
            if kind == "ciou":
                by_angle = np.stack([sides[..., 1], -sides[..., 0]], -1)
                square = (sides**2).sum(-1)
                d_sides = d_sides + sign * _quotient(d_turn, square)[..., None] * by_angle
            centre = sign * d_apart / 2
            d_low = centre - d_sides - d_overlap * low - d_hull * (1 - low)
            d_high = centre + d_sides + d_overlap * high + d_hull * (1 - high)
            d = np.concatenate(np.broadcast_arrays(d_low, d_high), -1)
            gradients.append(np.where(defined, d, 0))
        return gradients[0], gradients[1]
