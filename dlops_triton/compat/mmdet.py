"""The losses, overlaps and the assigner as mmdet has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dlops_triton import ghm
from dlops_triton import nn as native
from dlops_triton.focal import sigmoid_focal_loss as _native_focal
from dlops_triton.iou import box_iou as _native_box_iou
from dlops_triton.iou import generalized_box_iou as _native_generalized_box_iou
from dlops_triton.iou_loss import distance_box_iou_loss, generalized_box_iou_loss

from ._assigner import AssignResult, MaxIoUAssigner
from ._common import aligned_overlaps

__all__ = [
    "GHMC",
    "GHMR",
    "AssignResult",
    "DIoULoss",
    "FocalLoss",
    "GIoULoss",
    "MaxIoUAssigner",
    "bbox_overlaps",
    "diou_loss",
    "giou_loss",
    "sigmoid_focal_loss",
]

_REDUCTIONS = ("none", "mean", "sum")
_NO_LABEL = -(2**63)  # labels that mmdet does not know to ignore are background
_EPS = torch.finfo(torch.float32).eps


def _reduced(loss: Tensor, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
    if reduction == "sum":
        return total
    return total / (max(loss.numel(), 1) if avg_factor is None else avg_factor + _EPS)


def _promoted(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype: fp16 would round what a half-precision ``pred`` is compared with."""
    dtype = torch.promote_types(pred.dtype, target.dtype)
    return pred.to(dtype), target.to(dtype)


def _check(reduction: str, avg_factor: float | Tensor | None) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of 'none', 'mean', 'sum', got {reduction!r}")
    if avg_factor is not None and reduction == "sum":
        raise ValueError('avg_factor can not be used with reduction="sum"')


class GHMC(native.GHMC):
    """mmdet's ``GHMC``: :class:`dlops_triton.nn.GHMC`, which see.

    Differs from mmdet's: "sum" works; a NaN under weight 0 does not spoil the loss; the momentum's
    counts change in training only; ``edges`` stay fp32 in a module of half precision, where
    mmdet's last bin loses the hardest examples.
    """


class GHMR(native.GHMR):
    """mmdet's ``GHMR``: :class:`dlops_triton.nn.GHMR`, which differs as :class:`GHMC` does."""

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss. ``avg_factor`` is ignored, as in mmdet."""
        return ghmr_forward(self, pred, target, label_weight, avg_factor, reduction_override)


def ghmc_forward(
    self: Any,
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    reduction_override: str | None = None,
    **_: Any,
) -> Tensor:
    """``forward`` of any object with the attributes of :class:`GHMC`."""
    return _ghm(self, pred, target, label_weight, None, reduction_override)


def ghmr_forward(
    self: Any,
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    avg_factor: float | Tensor | None = None,
    reduction_override: str | None = None,
) -> Tensor:
    """``forward`` of any object with the attributes of :class:`GHMR`."""
    return _ghm(self, *_promoted(pred, target), label_weight, self.mu, reduction_override)


def _ghm(
    self: Any,
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    mu: float | None,
    reduction_override: str | None,
) -> Tensor:
    acc_sum = getattr(self, "acc_sum", None)
    if acc_sum is not None and acc_sum.dtype not in (torch.float32, torch.float64):
        self.acc_sum = acc_sum = acc_sum.float()  # mmdet's module was converted
    reduction = reduction_override or self.reduction
    return ghm.loss(
        *(pred, target, label_weight, mu, self.bins, self.momentum, acc_sum, reduction),
        *(self.loss_weight, None, getattr(self, "steps", None)),
        getattr(self, "process_group", None),
        update=self.training,
    )


def sigmoid_focal_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float = 0.25,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """mmdet's ``sigmoid_focal_loss``, by :func:`dlops_triton.sigmoid_focal_loss`.

    Args:
        pred: logits [N, C], fp16, bf16, fp32 or fp64, any strides.
        target: labels [N], integer, one outside [0, C) being background; or dense, [N, C].
        weight: [N] or [N, 1], per element [N, C] or flat [N C], any dtype, without a gradient; or
            None.
        gamma: focusing exponent, at least 0.
        alpha: weight of the positives, in [0, 1].
        reduction: "none", "sum" or "mean".
        avg_factor: divisor of "mean" instead of N C; it is not read on the host.

    Returns:
        "none": [N, C] in the dtype of pred. "sum", "mean": a scalar, fp32 (fp64 for fp64).

    Raises:
        ValueError: ``avg_factor`` with "sum", another reduction, or a wrong shape.

    Differs from mmdet's where :func:`dlops_triton.compat.mmcv.sigmoid_focal_loss` differs from
    mmcv's. Half precision is reduced in fp32; the mean of nothing is 0, not NaN; a label of -1 is
    background on a CPU as well, where mmdet raises.
    """
    _check(reduction, avg_factor)
    if weight is not None and not weight.is_floating_point():
        weight = weight.to(torch.float32)
    if weight is not None and weight.shape != pred.shape:
        n = pred.shape[0]
        weight = weight.reshape(n) if weight.shape[0] == n else weight.reshape(n, -1)
    if target.dim() == pred.dim() and not target.is_floating_point():
        target = target.to(pred.dtype)
    if isinstance(avg_factor, Tensor) or (avg_factor is not None and reduction == "mean"):
        avg_factor = avg_factor + _EPS
    loss: Tensor = _native_focal(
        pred,
        target,
        alpha,
        gamma,
        reduction,  # type: ignore[arg-type]
        weight=weight,
        avg_factor=avg_factor if reduction == "mean" else None,
        ignore_index=_NO_LABEL,
    )
    return loss


class FocalLoss(nn.Module):
    """mmdet's ``FocalLoss`` of logits: :func:`sigmoid_focal_loss` with its settings.

    Args:
        use_sigmoid: must be True.
        gamma, alpha, reduction: as there.
        loss_weight: factor of the result.
        activated: must be False: what has passed a sigmoid has lost its digits.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ):
        super().__init__()
        if not use_sigmoid:
            raise ValueError(f"use_sigmoid must be True, got {use_sigmoid!r}")
        if activated:
            raise ValueError(f"activated must be False, got {activated!r}: pass logits")
        self.use_sigmoid = use_sigmoid
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.activated = activated

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss."""
        return focal_loss_forward(self, pred, target, weight, avg_factor, reduction_override)


def focal_loss_forward(
    self: Any,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction_override: str | None = None,
) -> Tensor:
    """``forward`` of any object with the attributes of :class:`FocalLoss`."""
    loss = sigmoid_focal_loss(
        *(pred, target, weight, self.gamma, self.alpha),
        *(reduction_override or self.reduction, avg_factor),
    )
    return loss if self.loss_weight == 1 else self.loss_weight * loss


def _box_loss(
    function: Any,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    eps: float,
) -> Tensor:
    _check(reduction, avg_factor)
    pred, target = _promoted(pred, target)
    if weight is not None:
        return _reduced(function(pred, target, "none", eps) * weight, reduction, avg_factor)
    if avg_factor is None or reduction == "none":
        loss: Tensor = function(pred, target, reduction, eps)
        return loss
    return function(pred, target, "sum", eps) / (avg_factor + _EPS)


def giou_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """mmdet's ``giou_loss``, by :func:`dlops_triton.generalized_box_iou_loss`.

    Args:
        pred: [N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        target: [N, 4].
        weight: [N] or None.
        reduction: "none", "sum" or "mean".
        avg_factor: divisor of "mean" instead of N; it is not read on the host.
        eps: added to the denominators.

    Returns:
        "none": [N] in the wider dtype of pred and target. "sum", "mean": a scalar, fp32 (fp64 for
        fp64); 0 of no boxes, where mmdet's mean is NaN.

    Raises:
        ValueError: ``avg_factor`` with "sum", another reduction, or a wrong shape.

    Differs from mmdet's: denominators below ``eps`` are raised to it there, so the values differ by
    eps / area; half precision is reduced in fp32; the mean of nothing is 0, not NaN.
    """
    return _box_loss(generalized_box_iou_loss, pred, target, weight, reduction, avg_factor, eps)


def diou_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """mmdet's ``diou_loss``, by :func:`dlops_triton.distance_box_iou_loss`.

    Args:
        pred, target, weight, reduction, avg_factor: as in :func:`giou_loss`.
        eps: added to the denominators.

    Returns:
        As :func:`giou_loss`.

    Differs from mmdet's: the arithmetic is fp32 in half precision, where areas overflow from a side
    of 256 on; the mean of nothing is 0, not NaN.
    """
    return _box_loss(distance_box_iou_loss, pred, target, weight, reduction, avg_factor, eps)


class _IoULoss(nn.Module):
    def __init__(self, eps: float = 1e-6, reduction: str = "mean", loss_weight: float = 1.0):
        super().__init__()
        self.eps = eps
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss. ``weight``: [N], or [N, 4], of which the mean counts."""
        if weight is not None and weight.dim() > 1:
            weight = weight.mean(-1)
        reduction = reduction_override or self.reduction
        function = giou_loss if isinstance(self, GIoULoss) else diou_loss
        kwargs.setdefault("eps", self.eps)
        return self.loss_weight * function(pred, target, weight, reduction, avg_factor, **kwargs)


class GIoULoss(_IoULoss):
    """mmdet's ``GIoULoss``: :func:`giou_loss` with its settings.

    Args:
        eps, reduction: as there.
        loss_weight: factor of the result.

    Differs from mmdet's, which waits for the GPU to see whether a weight is above 0, and where none
    is gives a scalar, also of "none": the sum of pred times weight.
    """


class DIoULoss(_IoULoss):
    """mmdet's ``DIoULoss``: :func:`diou_loss` with its settings; as :class:`GIoULoss`.

    Differs from mmdet's as that does.
    """


def bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    mode: str = "iou",
    is_aligned: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """mmdet's ``bbox_overlaps``, by :func:`dlops_triton.box_iou` and ``generalized_box_iou``.

    Args:
        bboxes1: [..., N, 4] boxes (x1, y1, x2, y2), floating point or integer.
        bboxes2: [..., M, 4].
        mode: "iou", "iof" (over the area of the box of ``bboxes1``) or "giou".
        is_aligned: pair by pair instead of each with each; M is then N.
        eps: denominators are at least so large. Each with each it is not used, see below.

    Returns:
        [..., N, M], aligned [..., N], in the wider dtype of the boxes, of integers fp32.

    Raises:
        ValueError: another ``mode``, or a wrong shape.

    Differs from mmdet, each with each: a union below ``eps`` is taken as it is, so that boxes of
    normalized coordinates with a side of 0.001 have their IoU. A union of 0 gives 0 in either.
    Areas are fp32 in half precision, where mmdet's fp16 overflows from a side of 256 on.
    """
    if mode not in ("iou", "iof", "giou"):
        raise ValueError(f"mode must be one of 'iou', 'iof', 'giou', got {mode!r}")
    leading = bboxes1.shape[:-2]
    n, m = bboxes1.shape[-2], bboxes2.shape[-2]
    if leading != bboxes2.shape[:-2] or (is_aligned and n != m):
        raise ValueError(
            "bboxes2 must have the leading dimensions of bboxes1, and as many boxes where they are "
            f"aligned, got {tuple(bboxes1.shape)} and {tuple(bboxes2.shape)}"
        )
    if n * m == 0:
        return bboxes1.new_empty((*leading, n) if is_aligned else (*leading, n, m))
    dtype = torch.promote_types(bboxes1.dtype, bboxes2.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    if is_aligned:
        exact = torch.promote_types(dtype, torch.float32)
        return aligned_overlaps(bboxes1.to(exact), bboxes2.to(exact), mode, 0, eps).to(dtype)
    if mode == "giou":
        return _native_generalized_box_iou(bboxes1.to(dtype), bboxes2.to(dtype))
    return _native_box_iou(bboxes1.to(dtype), bboxes2.to(dtype), mode=mode)  # type: ignore[arg-type]
