"""Pairwise box IoU, its generalized, distance and complete forms, and gradients, in float64."""

from __future__ import annotations

import numpy as np

from ._boxes import IGNORE, Array, similarity, similarity_grad


def box_penalized(
    boxes1: Array, boxes2: Array, kind: str, *, offset: int = 0, eps: float = 0.0
) -> Array:
    """GIoU, DIoU or CIoU ("giou", "diou", "ciou") of [..., N, 4] with [..., M, 4]."""
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    return similarity(a, b, kind, offset=offset, eps=eps)


def box_penalized_grad(
    boxes1: Array, boxes2: Array, grad: Array, kind: str, *, offset: int = 0, eps: float = 0.0
) -> tuple[Array, Array]:
    """Gradients [..., N, 4] and [..., M, 4] of ``sum(grad * box_penalized(boxes1, boxes2))``."""
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    d1, d2 = similarity_grad(a, b, grad, kind, offset=offset, eps=eps)
    return d1.sum(-2), d2.sum(-3)


def _intersection(boxes1: Array, boxes2: Array, offset: int) -> tuple[Array, Array]:
    """Signed width-and-height [..., N, M, 2] of the intersections, and their areas [..., N, M]."""
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + offset
    return sides, np.maximum(sides, 0).prod(-1)


def _areas(boxes: Array, offset: int) -> Array:
    return (boxes[..., 2:] - boxes[..., :2] + offset).prod(-1)


def box_iou(boxes1: Array, boxes2: Array, *, offset: int = 0, mode: str = "iou") -> Array:
    """IoU or IoF of [..., N, 4] with [..., M, 4], float64 [..., N, M]."""
    with np.errstate(**IGNORE):
        boxes1, boxes2 = boxes1.astype(np.float64), boxes2.astype(np.float64)
        _, inter = _intersection(boxes1, boxes2, offset)
        below = _areas(boxes1, offset)[..., :, None] + 0 * inter
        if mode == "iou":
            below = below + _areas(boxes2, offset)[..., None, :] - inter
        return np.where(below == 0, 0.0, inter / below)


def box_iou_grad(
    boxes1: Array, boxes2: Array, grad: Array, *, offset: int = 0, mode: str = "iou"
) -> tuple[Array, Array]:
    """Gradients [..., N, 4] and [..., M, 4] of ``sum(grad * box_iou(boxes1, boxes2))``."""
    with np.errstate(**IGNORE):
        boxes1, boxes2 = boxes1.astype(np.float64), boxes2.astype(np.float64)
        sides, inter = _intersection(boxes1, boxes2, offset)
        area1, area2 = _areas(boxes1, offset)[..., :, None], _areas(boxes2, offset)[..., None, :]
        below = area1 + area2 - inter if mode == "iou" else area1 + 0 * inter
        iou = inter / below
        defined = (below != 0) & ~np.isnan(iou)

        # The quotient rule, with the denominator's own dependence on the intersection.
        d_inter = np.where(defined, grad / below * (1 + iou if mode == "iou" else 1), 0)
        d_area = np.where(defined, -grad * iou / below, 0)
        overlapping = defined & (sides >= 0).all(-1)
        d_sides = np.where(overlapping[..., None], d_inter[..., None] * sides[..., ::-1], 0)

        a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
        d1, d2 = np.zeros_like(boxes1), np.zeros_like(boxes2)
        # torch's rule: the operand that is the min or max takes all, equal ones half each.
        low = 0.5 * (1 + np.sign(a[..., :2] - b[..., :2]))
        high = 0.5 * (1 - np.sign(a[..., 2:] - b[..., 2:]))
        for d, axis, low_share, high_share in ((d1, -2, low, high), (d2, -3, 1 - low, 1 - high)):
            for k in (0, 1):
                share = np.where(overlapping, low_share[..., k], 0)
                d[..., k] = -(d_sides[..., k] * share).sum(axis + 1)
                share = np.where(overlapping, high_share[..., k], 0)
                d[..., k + 2] = (d_sides[..., k] * share).sum(axis + 1)
        _add_area_grad(d1, boxes1, d_area.sum(-1), offset)
        if mode == "iou":
            _add_area_grad(d2, boxes2, d_area.sum(-2), offset)
        return d1, d2


def _add_area_grad(d: Array, boxes: Array, d_area: Array, offset: int) -> None:
    opposite = (boxes[..., 2:] - boxes[..., :2] + offset)[..., ::-1]
    change = np.where(d_area[..., None] == 0, 0, d_area[..., None] * opposite)
    d[..., :2] -= change
    d[..., 2:] += change
