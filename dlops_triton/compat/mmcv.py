"""The ops as ``mmcv.ops`` has them: ``gamma`` before ``alpha``, boxes with scores, ``offset``.

numpy arrays are taken where mmcv takes them, and then returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dlops_triton import _checks
from dlops_triton.focal import sigmoid_focal_loss as _native_sigmoid_focal_loss
from dlops_triton.iou import box_iou as _native_box_iou
from dlops_triton.nms import batched_nms as _native_batched_nms
from dlops_triton.nms import nms as _native_nms
from dlops_triton.soft_nms import soft_nms as _native_soft_nms
from dlops_triton.softmax_focal import softmax_focal_loss as _native_softmax_focal_loss

from ._common import aligned_overlaps, class_ids, renamed
from ._deform import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    deform_conv2d,
    modulated_deform_conv2d,
)

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "batched_nms",
    "bbox_overlaps",
    "deform_conv2d",
    "modulated_deform_conv2d",
    "nms",
    "sigmoid_focal_loss",
    "soft_nms",
    "softmax_focal_loss",
]

Array: TypeAlias = Tensor | npt.NDArray[Any]

_METHODS = {"naive": "hard", "linear": "linear", "gaussian": "gaussian"}
_NO_LABEL = -(2**63)  # labels that mmcv does not know to ignore are background


@renamed(iou_thr="iou_threshold")
def nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Array, Array]:
    """``mmcv.ops.nms``, by :func:`dlops_triton.nms`.

    Args:
        boxes: [N, 4] boxes (x1, y1, x2, y2), floating point.
        scores: [N].
        iou_threshold: in [0, 1]. A box is dropped when its IoU with a kept one is greater.
            ``iou_thr`` is its older name.
        offset: 1 adds 1 to every width and height.
        score_threshold: where above 0, only boxes with a greater score take part.
        max_num: where above 0, at most so many boxes are returned.

    Returns:
        ``(dets, inds)``: [K, 5] kept boxes with their scores, by descending score, and int64 [K],
        their indices.

    Differs from mmcv: fp16, bf16 and fp64 work; any number of boxes, where mmcv's bitmask goes
    wrong above 262,144 on a GPU; equal scores in order of index; NaN scores last; a box turned
    inside out along one axis is not suppressed by all others.
    """
    boxes, scores, is_numpy = _tensors(boxes, scores)
    inds = _native_nms(
        boxes,
        scores,
        iou_threshold,
        offset=offset,
        score_threshold=score_threshold if score_threshold > 0 else None,
        max_output=max_num if max_num > 0 else None,
    )
    return _dets(boxes, scores[inds], inds, is_numpy)


@renamed(iou_thr="iou_threshold")
def soft_nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
) -> tuple[Array, Array]:
    """``mmcv.ops.soft_nms``, by :func:`dlops_triton.soft_nms`, and on a GPU where the boxes are.

    Args:
        boxes: [N, 4] boxes (x1, y1, x2, y2), floating point.
        scores: [N].
        iou_threshold: in [0, 1]. "linear" and "naive" decay from this IoU on.
        sigma: of "gaussian".
        min_score: at least 0. A box whose score falls below it, or to 0, is dropped, the first one
            excepted.
        method: "linear", "gaussian" or "naive".
        offset: 1 adds 1 to every width and height.

    Returns:
        ``(dets, inds)``: [K, 5] boxes with their decayed scores in the order in which they were
        taken, and int64 [K], their indices.

    Differs from mmcv: any floating dtype works; equal scores in order of index; two boxes without
    area do not turn a "gaussian" score into NaN; "naive" with a threshold of 0 keeps boxes that do
    not touch; NaN scores and, with a ``min_score`` of 0, scores of 0 are dropped.
    """
    boxes, scores, is_numpy = _tensors(boxes, scores)
    inds, decayed = _soft(boxes, scores, None, iou_threshold, sigma, min_score, method, offset)
    return _dets(boxes, decayed, inds, is_numpy)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    nms_cfg: Mapping[str, Any] | None,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor]:
    """``mmcv.ops.batched_nms``, by :func:`dlops_triton.batched_nms` or ``soft_nms``.

    Args:
        boxes: [N, 4] boxes (x1, y1, x2, y2), floating point.
        scores: [N].
        idxs: [N] class of each box, any dtype.
        nms_cfg: None: nothing is suppressed, the boxes are sorted. Else ``type``, "nms" (the
            default), "soft_nms", or the function; ``class_agnostic``, which goes before the
            argument; ``max_num``; ``split_thr``, which is not needed and not used; and the
            arguments of the type.
        class_agnostic: boxes of different classes suppress one another as well.

    Returns:
        ``(dets, keep)``: [K, 5] boxes with their scores, by descending score, and int64 [K], their
        indices.

    Raises:
        ValueError: another type (rotated boxes are not covered).

    Differs from mmcv: classes are compared, not shifted apart by an offset of their coordinates,
    which fails for negative, infinite and, in the last digits, for all coordinates. From 10,000
    boxes on mmcv forgets ``class_agnostic``; here the number of boxes changes nothing.
    """
    if nms_cfg is None:
        scores, order = scores.sort(descending=True, stable=True)
        return torch.cat((boxes[order], scores[:, None]), -1), order
    options = dict(nms_cfg)
    class_agnostic = options.pop("class_agnostic", class_agnostic)
    options.pop("split_thr", None)
    kind = nms_type(nms_cfg)
    options.pop("type", None)
    classes = None if class_agnostic else class_ids(idxs)
    if kind == "nms":
        keep = _hard(boxes, scores, classes, **options)
        scores = scores[keep]
    elif kind == "soft_nms":
        keep, scores = _soft_of_config(boxes, scores, classes, **options)
    else:
        raise ValueError(f"nms_cfg['type'] must be 'nms' or 'soft_nms', got {kind!r}")
    return torch.cat((boxes[keep], scores[:, None]), -1), keep


def nms_type(nms_cfg: Mapping[str, Any]) -> Any:
    """The type that a config asks for; of mmcv's functions and of those here the name."""
    kind = nms_cfg.get("type", "nms")
    # Not of what only has a name of theirs.
    known = getattr(kind, "__module__", None) in ("mmcv.ops.nms", __name__)
    return getattr(kind, "__name__", kind) if known else kind


@renamed(iou_thr="iou_threshold")
def _hard(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> Tensor:
    options: dict[str, Any] = {
        "offset": offset,
        "score_threshold": score_threshold if score_threshold > 0 else None,
        "max_output": max_num if max_num > 0 else None,
    }
    if classes is None:
        return _native_nms(boxes, scores, iou_threshold, **options)
    return _native_batched_nms(boxes, scores, classes, iou_threshold, **options)


@renamed(iou_thr="iou_threshold")
def _soft_of_config(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
    max_num: int = -1,
) -> tuple[Tensor, Tensor]:
    keep, scores = _soft(boxes, scores, classes, iou_threshold, sigma, min_score, method, offset)
    return (keep[:max_num], scores[:max_num]) if max_num > 0 else (keep, scores)


def _soft(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: str,
    offset: int,
) -> tuple[Tensor, Tensor]:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    _checks.number("iou_threshold", iou_threshold, 0, 1, "in [0, 1]")
    _checks.number("min_score", min_score, 0, float("inf"), "at least 0 and finite")
    inds, decayed = _native_soft_nms(
        boxes,
        scores,
        _just_below(iou_threshold),
        sigma,
        _just_below(min_score),
        _METHODS[method],  # type: ignore[arg-type]
        idxs=classes,
        offset=offset,  # type: ignore[arg-type]
    )
    if inds.numel() == 0 and scores.numel():
        # mmcv takes the first box whatever its score.
        first = scores.argmax(0, keepdim=True)
        return first, scores[first]
    return inds, decayed


def _just_below(limit: float) -> float:
    """What a number of fp32 is above where it is at least ``limit``; 0 stays."""
    return float(np.nextafter(np.float32(limit), np.float32(0)))


def _tensors(boxes: Array, scores: Array) -> tuple[Tensor, Tensor, bool]:
    is_numpy = isinstance(boxes, np.ndarray)
    boxes, scores = (
        torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in (boxes, scores)
    )
    return boxes, scores, is_numpy


def _dets(boxes: Tensor, scores: Tensor, inds: Tensor, is_numpy: bool) -> tuple[Array, Array]:
    dets = torch.cat((boxes[inds], scores[:, None]), 1)
    return (dets.numpy(), inds.numpy()) if is_numpy else (dets, inds)


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, mode: str = "iou", aligned: bool = False, offset: int = 0
) -> Tensor:
    """``mmcv.ops.bbox_overlaps``, by :func:`dlops_triton.box_iou`, and differentiable.

    Args:
        bboxes1: [N, 4] boxes (x1, y1, x2, y2), floating point, or empty.
        bboxes2: [M, 4], or empty.
        mode: "iou", or "iof": over the area of the box of ``bboxes1``.
        aligned: pair by pair instead of each with each; M is then N.
        offset: 1 adds 1 to every width and height.

    Returns:
        [N, M], aligned [N], in the dtype of the boxes.

    Raises:
        TypeError, ValueError: another ``mode`` or ``offset``, or a wrong dtype or shape.

    Differs from mmcv: two boxes without area have IoU 0, not NaN; areas are fp32 in half precision,
    where mmcv's overflow beyond a side of 255.
    """
    if mode not in ("iou", "iof"):
        raise ValueError(f"mode must be 'iou' or 'iof', got {mode!r}")
    _checks.choice("offset", offset, (0, 1))
    n, m = bboxes1.shape[0], bboxes2.shape[0]
    if aligned and n != m:
        raise ValueError(f"aligned boxes must be of one number, got {n} and {m}")
    if n * m == 0:
        return bboxes1.new_zeros(n if aligned else (n, m))
    if not aligned:
        return _native_box_iou(bboxes1, bboxes2, offset=offset, mode=mode)  # type: ignore[arg-type]
    _checks.boxes("bboxes1", bboxes1)
    _checks.boxes("bboxes2", bboxes2)
    exact = torch.promote_types(bboxes1.dtype, torch.float32)
    smallest = torch.finfo(exact).tiny
    overlaps = aligned_overlaps(bboxes1.to(exact), bboxes2.to(exact), mode, offset, smallest)
    return overlaps.to(bboxes1.dtype)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``mmcv.ops.sigmoid_focal_loss``, by :func:`dlops_triton.sigmoid_focal_loss`.

    Args:
        input: logits [N, C], fp16, bf16, fp32 or fp64, any strides.
        target: labels [N], integer. One outside [0, C) is background.
        gamma: focusing exponent, at least 0.
        alpha: weight of the positives, in [0, 1].
        weight: [C] or None: factor of the row of a label of that class; of background it is 1.
        reduction: "none", "sum", or "mean": the sum over N.

    Returns:
        "none": [N, C] in the dtype of input. "sum", "mean": a scalar, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.

    Differs from mmcv, whose loss of a background logit stops at 65.5 from 17 on and is NaN or
    infinite in fp16; which waits for the GPU in each call, has no CPU version and no bf16, reads
    past the end of ``weight`` for background, and logits that are not contiguous as if they were.
    """
    _check_focal(input, weight)
    if weight is not None:
        c = input.shape[1]
        known = (target >= 0) & (target < c)
        weight = torch.where(known, weight[target.clamp(0, c - 1)], 1.0)
    loss: Tensor = _native_sigmoid_focal_loss(
        input,
        target,
        alpha,
        gamma,
        reduction,  # type: ignore[arg-type]
        weight=weight,
        avg_factor=max(input.shape[0], 1) if reduction == "mean" else None,
        ignore_index=_NO_LABEL,
    )
    return loss


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``mmcv.ops.softmax_focal_loss``, by :func:`dlops_triton.softmax_focal_loss`.

    Args:
        input: logits [N, C], fp16, bf16, fp32 or fp64, any strides.
        target: labels [N], integer. One outside [0, C) has no loss.
        gamma: focusing exponent, at least 0.
        alpha: factor of every loss.
        weight: [C] or None: factor of each class.
        reduction: "none", "sum", or "mean": the sum over N, rows without loss included.

    Returns:
        "none": [N] in the dtype of input. "sum", "mean": a scalar, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.

    Differs from mmcv, whose backward of "none" fails, or where N is C scales columns instead of
    rows; whose loss stops at 87.3 alpha; whose gradient is NaN for gamma below 1 where p is 1; and
    which reads past its arrays for labels outside [0, C).
    """
    _check_focal(input, weight)
    return _native_softmax_focal_loss(
        input,
        target,
        alpha,
        gamma,
        reduction,  # type: ignore[arg-type]
        weight=weight,
        avg_factor=max(input.shape[0], 1) if reduction == "mean" else None,
    )


def _check_focal(input: Tensor, weight: Tensor | None) -> None:
    if input.dim() != 2:
        raise ValueError(f"input must have shape [N, C], got {tuple(input.shape)}")
    if weight is not None and weight.shape != input.shape[1:]:
        raise ValueError(
            f"weight must have shape {tuple(input.shape[1:])}, one per class, got "
            f"{tuple(weight.shape)}"
        )


class _FocalLoss(nn.Module):
    weight: Tensor | None

    def __init__(
        self, gamma: float, alpha: float, weight: Tensor | None = None, reduction: str = "mean"
    ):
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction}"


class SigmoidFocalLoss(_FocalLoss):
    """``mmcv.ops.SigmoidFocalLoss``: :func:`sigmoid_focal_loss` with its settings."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return sigmoid_focal_loss(
            input, target, self.gamma, self.alpha, self.weight, self.reduction
        )


class SoftmaxFocalLoss(_FocalLoss):
    """``mmcv.ops.SoftmaxFocalLoss``: :func:`softmax_focal_loss` with its settings."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return softmax_focal_loss(
            input, target, self.gamma, self.alpha, self.weight, self.reduction
        )
