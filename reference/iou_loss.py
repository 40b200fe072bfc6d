"""GIoU, DIoU and CIoU losses of pairs of boxes and their gradients, in float64."""

from __future__ import annotations

from ._boxes import Array, similarity, similarity_grad


def iou_loss(boxes1: Array, boxes2: Array, kind: str, *, eps: float = 1e-7) -> Array:
    """1 - GIoU, DIoU or CIoU ("giou", "diou", "ciou") of [..., 4] with [..., 4], float64 [...]."""
    return 1 - similarity(boxes1, boxes2, kind, eps=eps, loss=True)


def iou_loss_grad(
    boxes1: Array, boxes2: Array, grad: Array, kind: str, *, eps: float = 1e-7
) -> tuple[Array, Array]:
    """Gradients, both [..., 4], of ``sum(grad * iou_loss(boxes1, boxes2, kind))``."""
    return similarity_grad(boxes1, boxes2, -grad, kind, eps=eps, loss=True)
