"""The ops as ``torchvision.ops`` has them: its signatures, dtypes and errors.

Each function is one call of a second, which TorchScript ignores: so a scripted model calls back
into Python (and cannot be saved). TorchScript reads annotations, so none is postponed here.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton._checks import number as check_number
from dlops_triton._dispatch import autocasting
from dlops_triton.deform import deform_conv2d as _native_deform_conv2d
from dlops_triton.focal import sigmoid_focal_loss as _native_focal
from dlops_triton.iou import box_iou as _native_box_iou
from dlops_triton.iou import complete_box_iou as _native_complete_box_iou
from dlops_triton.iou import distance_box_iou as _native_distance_box_iou
from dlops_triton.iou import generalized_box_iou as _native_generalized_box_iou
from dlops_triton.iou_loss import complete_box_iou_loss as _native_complete_loss
from dlops_triton.iou_loss import distance_box_iou_loss as _native_distance_loss
from dlops_triton.iou_loss import generalized_box_iou_loss as _native_generalized_loss
from dlops_triton.nms import batched_nms as _native_batched_nms
from dlops_triton.nms import nms as _native_nms
from dlops_triton.nn import DeformConv2d

from ._common import class_ids, ignored

__all__ = [
    "DeformConv2d",
    "batched_nms",
    "box_iou",
    "complete_box_iou",
    "complete_box_iou_loss",
    "deform_conv2d",
    "distance_box_iou",
    "distance_box_iou_loss",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "nms",
    "sigmoid_focal_loss",
]

Pair = tuple[int, int]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """``torchvision.ops.nms``, by :func:`dlops_triton.nms`.

    Args:
        boxes: [N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64; or quantized, as the scores.
        scores: [N].
        iou_threshold: a box is dropped when its IoU with a kept one is greater; at least 0.

    Returns:
        int64 [K], indices by descending score.

    Raises:
        RuntimeError: a tensor of the wrong shape, dtype or device.

    Differs from torchvision: NaN scores come last, not first; equal scores in order of index on
    every device; the threshold is fp32, as torchvision's on a GPU, where its fp64 one on a CPU has
    an fp32 IoU of 0.3 above 0.3; bf16 works, and fp16 on a CPU; a negative threshold is refused.
    """
    return _nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """``torchvision.ops.batched_nms``, by :func:`dlops_triton.batched_nms`.

    Args:
        boxes, scores, iou_threshold: as in :func:`nms`.
        idxs: [N] class of each box, any dtype.

    Returns:
        int64 [K], indices by descending score.

    Raises:
        RuntimeError: a tensor of the wrong shape, dtype or device.

    Differs from torchvision, which shifts classes apart by an offset of their coordinates: there
    negative coordinates let boxes of different classes suppress one another, an infinite one
    switches suppression off, and many classes cost digits. Here classes are compared.
    """
    return _batched_nms(boxes, scores, idxs, iou_threshold)


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """``torchvision.ops.box_iou``, by :func:`dlops_triton.box_iou`.

    Args:
        boxes1: [..., N, 4], floating point or integer.
        boxes2: [..., M, 4].
        fmt: "xyxy", "xywh" or "cxcywh". Rotated boxes are left to torchvision.

    Returns:
        [..., N, M], fp32, or fp64 for fp64 boxes.

    Raises:
        ValueError: another ``fmt``, or a wrong shape.

    Differs from torchvision: two boxes without area have IoU 0, not NaN; differentiating twice
    raises.
    """
    return _box_iou(boxes1, boxes2, fmt)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """``torchvision.ops.generalized_box_iou``, by :func:`dlops_triton.generalized_box_iou`.

    Args:
        boxes1: [..., N, 4] boxes (x1, y1, x2, y2), floating point or integer.
        boxes2: [..., M, 4].

    Returns:
        [..., N, M], fp32, or fp64 for fp64 boxes. Of two points in one place 0, not NaN.
    """
    return _generalized_box_iou(boxes1, boxes2)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """``torchvision.ops.distance_box_iou``, by :func:`dlops_triton.distance_box_iou`.

    Args:
        boxes1: [..., N, 4] boxes (x1, y1, x2, y2), floating point or integer.
        boxes2: [..., M, 4].
        eps: added to the squared diagonal.

    Returns:
        [..., N, M], fp32, or fp64 for fp64 boxes.
    """
    return _distance_box_iou(boxes1, boxes2, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """``torchvision.ops.complete_box_iou``, by :func:`dlops_triton.complete_box_iou`.

    Args:
        boxes1: [..., N, 4] boxes (x1, y1, x2, y2), floating point or integer.
        boxes2: [..., M, 4].
        eps: added to the squared diagonal and below alpha.

    Returns:
        [..., N, M], fp32, or fp64 for fp64 boxes. The angle of a point is 0, not NaN.
    """
    return _complete_box_iou(boxes1, boxes2, eps)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    """``torchvision.ops.sigmoid_focal_loss``, by :func:`dlops_triton.sigmoid_focal_loss`.

    Args:
        inputs: logits of any shape, fp16, bf16, fp32 or fp64.
        targets: the same shape, from 0 to 1, any dtype; without a gradient.
        alpha: in [0, 1], or -1 for none.
        gamma: at least 0. At 0 the loss is torch's binary cross-entropy, to the last bit.
        reduction: "none", "mean" (over all elements) or "sum".

    Returns:
        The loss, reduced or not, in the wider dtype of ``inputs`` and floating-point ``targets``;
        under autocast at least fp32.

    Raises:
        ValueError: ``alpha``, ``gamma`` or ``reduction`` out of range, or a wrong shape.

    Differs from torchvision: the arithmetic is fp32 whatever the dtype, so half-precision losses of
    easy examples keep their digits; gradients are finite for every gamma, and a negative one is
    refused; ``targets`` get no gradient; the mean of nothing is 0, not NaN; differentiating twice
    raises.
    """
    return _sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``torchvision.ops.generalized_box_iou_loss``, by the function of that name here.

    Args:
        boxes1: [..., 4] boxes (x1, y1, x2, y2), floating point or integer.
        boxes2: [..., 4], of a shape that broadcasts with it.
        reduction: "none", "mean" or "sum".
        eps: added to the denominators.

    Returns:
        The loss, fp32, or fp64 for fp64 boxes.

    Raises:
        ValueError: ``reduction`` is something else, or a wrong shape.
    """
    return _box_loss("giou", boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``torchvision.ops.distance_box_iou_loss``; as :func:`generalized_box_iou_loss`.

    Args:
        boxes1, boxes2, reduction, eps: as there.

    Returns:
        The loss, fp32, or fp64 for fp64 boxes.
    """
    return _box_loss("diou", boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``torchvision.ops.complete_box_iou_loss``; as :func:`generalized_box_iou_loss`.

    Args:
        boxes1, boxes2, reduction, eps: as there.

    Returns:
        The loss, fp32, or fp64 for fp64 boxes. The angle of a point is 0, not NaN.

    Differs from torchvision, whose ``eps`` reaches the denominator of alpha only; the others have
    the default's there.
    """
    return _box_loss("ciou", boxes1, boxes2, reduction, eps)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """``torchvision.ops.deform_conv2d``, by :func:`dlops_triton.deform_conv2d`.

    Args:
        input: [B, C, H, W], fp16, bf16, fp32 or fp64.
        offset: [B, 2 G kh kw, Ho, Wo], (y, x) for each tap.
        weight: [Co, C / groups, kh, kw].
        bias: [Co] or None.
        stride, padding, dilation: an int, or two, (y, x).
        mask: [B, G kh kw, Ho, Wo] or None.

    Returns:
        [B, Co, Ho, Wo] in the dtype of input. Under autocast computed in fp32, as torchvision does;
        :func:`dlops_triton.deform_conv2d` then computes in half precision.

    Raises:
        RuntimeError: a tensor of the wrong shape, dtype or device.

    Differs from torchvision: coordinates are fp32 whatever the dtype; the gradient at y = -1 or
    x = -1 is 0, as the value is; bf16 works on a CPU; the backward obeys
    ``torch.use_deterministic_algorithms(True)``, which torchvision's refuses on a GPU.
    Differentiating twice raises, as there.
    """
    return _deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


@ignored
def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    if boxes.is_quantized:  # IoU does not depend on the scale
        boxes, scores = boxes.int_repr().float(), scores.int_repr().float()
    try:
        return _native_nms(boxes, scores, min(float(iou_threshold), 1.0))
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error


@ignored
def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    try:
        threshold = min(float(iou_threshold), 1.0)
        return _native_batched_nms(boxes, scores, class_ids(idxs), threshold)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error


def _floating(boxes: Tensor) -> Tensor:
    """Boxes as torchvision computes with them: fp32, or fp64, which holds integers exactly."""
    if boxes.dtype in (torch.float32, torch.float64):
        return boxes
    return boxes.float() if boxes.is_floating_point() else boxes.double()


def _pairwise(function: Any, boxes1: Tensor, boxes2: Tensor, *options: Any) -> Tensor:
    """``function`` of boxes of any dtype, whose leading dimensions broadcast."""
    double = torch.float64 in (boxes1.dtype, boxes2.dtype)
    boxes1, boxes2 = _floating(boxes1), _floating(boxes2)
    if boxes1.dtype != boxes2.dtype:
        boxes1, boxes2 = boxes1.double(), boxes2.double()
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        leading = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
        boxes1 = boxes1.expand(*leading, *boxes1.shape[-2:])
        boxes2 = boxes2.expand(*leading, *boxes2.shape[-2:])
    value: Tensor = function(boxes1, boxes2, *options)
    return value if double else value.float()


@ignored
def _box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str) -> Tensor:
    if fmt in ("cxcywhr", "xywhr", "xyxyxyxy"):
        return _rotated_box_iou(boxes1, boxes2, fmt)
    if fmt != "xyxy":
        boxes1, boxes2 = _corners(boxes1, fmt), _corners(boxes2, fmt)
    return _pairwise(_native_box_iou, boxes1, boxes2)


def _rotated_box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str) -> Tensor:
    try:
        from torchvision.ops import boxes
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"fmt {fmt!r}, of rotated boxes, needs torchvision, got {error}"
        ) from error
    function: Any = getattr(boxes.box_iou, "_dlops_original", boxes.box_iou)
    return function(boxes1, boxes2, fmt)


def _corners(boxes: Tensor, fmt: str) -> Tensor:
    if fmt not in ("xywh", "cxcywh"):
        raise ValueError(f"fmt must be one of 'xyxy', 'xywh', 'cxcywh', got {fmt!r}")
    first, size = _floating(boxes).split(2, -1)
    if fmt == "cxcywh":
        first = first - size / 2
    return torch.cat((first, first + size), -1)


@ignored
def _generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return _pairwise(_native_generalized_box_iou, boxes1, boxes2)


@ignored
def _distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    return _pairwise(_native_distance_box_iou, boxes1, boxes2, eps)


@ignored
def _complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    return _pairwise(_native_complete_box_iou, boxes1, boxes2, eps)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid reduction: {reduction!r}; it must be one of 'none', 'mean', 'sum'"
        )


@ignored
def _sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str
) -> Tensor:
    _check_reduction(reduction)
    dtype = inputs.dtype
    if targets.dtype != dtype:
        if not targets.is_floating_point():
            targets = targets.to(dtype)
        dtype = torch.promote_types(dtype, targets.dtype)
    if autocasting(inputs.device):
        dtype = torch.promote_types(dtype, torch.float32)
    if gamma == 0:
        return _cross_entropy(inputs.to(dtype), targets.to(dtype), alpha, reduction)
    # Reduced, the loss is fp32 anyway.
    if inputs.dtype != dtype and (reduction == "none" or dtype == torch.float64):
        inputs = inputs.to(dtype)
    loss: Tensor = _native_focal(inputs, targets, alpha, gamma, reduction)  # type: ignore[arg-type]
    return loss if loss.dtype == dtype else loss.to(dtype)


def _cross_entropy(inputs: Tensor, targets: Tensor, alpha: float, reduction: str) -> Tensor:
    """What torchvision's is at ``gamma=0``: torch's, whose last bit callers compare with."""
    if alpha != -1:
        check_number("alpha", alpha, 0, 1, "in [0, 1], or -1 for none")
    weight = None if alpha == -1 else alpha * targets + (1 - alpha) * (1 - targets)
    return F.binary_cross_entropy_with_logits(inputs, targets, weight, reduction=reduction)


_BOX_LOSSES: dict[str, Any] = {
    "giou": _native_generalized_loss,
    "diou": _native_distance_loss,
    "ciou": _native_complete_loss,
}


@ignored
def _box_loss(kind: str, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    _check_reduction(reduction)
    if boxes1.dtype not in (torch.float32, torch.float64):
        boxes1 = boxes1.float()
    if boxes2.dtype not in (torch.float32, torch.float64):
        boxes2 = boxes2.float()
    if boxes1.dtype != boxes2.dtype:
        boxes1, boxes2 = boxes1.double(), boxes2.double()
    if boxes1.shape != boxes2.shape:
        boxes1, boxes2 = torch.broadcast_tensors(boxes1, boxes2)
    loss: Tensor = _BOX_LOSSES[kind](boxes1, boxes2, reduction, eps)
    return loss


@ignored
def _deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    if autocasting(input.device):
        tensors: list[Any] = [
            t if t is None or t.dtype == torch.float64 else t.float()
            for t in (input, offset, weight, bias, mask)
        ]
        with torch.autocast(input.device.type, enabled=False):
            out = _native_deform_conv2d(*tensors[:4], stride, padding, dilation, tensors[4])  # type: ignore[call-arg, arg-type]
        return out.to(input.dtype)
    try:
        return _native_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    except (TypeError, ValueError) as error:
        raise RuntimeError(_in_torchvisions_words(str(error))) from error


def _in_torchvisions_words(message: str) -> str:
    """An error of a shape, with what callers of torchvision look for in it."""
    if message.startswith("offset must have shape"):
        return f"the shape of the offset is not valid: {message}"
    if message.startswith("mask must have shape"):
        return f"mask.shape[1] is not valid: {message}"
    return message
