"""torchvision's formulas of the IoU family, differentiable by torch, for pairs that broadcast."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KINDS = ["giou", "diou", "ciou"]


def boxes(
    rng: np.random.Generator, *shape: int, size: int = 60, least: int = 0, span: int = 60
) -> Tensor:
    """Overlapping boxes whose coordinates every dtype holds exactly, sides from ``least``."""
    corner = rng.integers(-span // 2, span, (*shape, 2))
    sides = rng.integers(least, size, (*shape, 2))
    return torch.from_numpy(np.concatenate([corner, corner + sides], -1)).double()


def similarity(
    a: Tensor, b: Tensor, kind: str, eps: float, offset: int = 0, loss: bool = False
) -> Tensor:
    """GIoU, DIoU or CIoU: of ``ops/boxes.py``, or with ``loss`` 1 minus that of ``ops/*_loss.py``.

    A quotient is 0 where its denominator is.
    """
    overlap = torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2]) + offset
    hull = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2]) + offset
    if loss:
        inside = (overlap > 0).all(-1)
        inter = torch.where(inside, overlap.prod(-1), 0)
    else:
        inter = overlap.clamp(min=0).prod(-1)
        hull = hull.clamp(min=0)
    side_a, side_b = (x[..., 2:] - x[..., :2] + offset for x in (a, b))
    union = side_a.prod(-1) + side_b.prod(-1) - inter
    iou = _quotient(inter, union + eps if loss else union)
    if kind == "giou":
        area = hull.prod(-1)
        return iou - _quotient(area - union, area + eps)
    centre_a, centre_b = ((x[..., 2:] + x[..., :2]) / 2 for x in (a, b))
    diagonal = (hull**2).sum(-1) + eps
    value = iou - _quotient(((centre_a - centre_b) ** 2).sum(-1), diagonal)
    if kind == "ciou":
        angle_a, angle_b = (torch.atan(s[..., 0] / s[..., 1]) for s in (side_a, side_b))
        v = 4 / torch.pi**2 * (angle_b - angle_a) ** 2
        with torch.no_grad():
            alpha = v / (1 - iou + v + eps)
        value = value - alpha * v
    return value


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    defined = below != 0
    return torch.where(defined, above / torch.where(defined, below, 1), 0)
