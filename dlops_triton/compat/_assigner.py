"""mmdet's assignment of anchors to boxes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlops_triton.iou import box_iou as _native_box_iou
from dlops_triton.match import box_match


class AssignResult(NamedTuple):
    """What :class:`MaxIoUAssigner` finds, with the names of mmdet's ``AssignResult``."""

    num_gts: int
    gt_inds: Tensor
    max_overlaps: Tensor
    labels: Tensor


class MaxIoUAssigner:
    """mmdet's ``MaxIoUAssigner``, by :func:`dlops_triton.box_match`, without the matrix of IoUs.

    Args:
        pos_iou_thr: an anchor is positive from this IoU on.
        neg_iou_thr: negative below it; of two, from the first on and below the second.
        min_pos_iou: a box's best anchors are its own from this IoU on.
        gt_max_assign_all: must be True: all anchors of exactly the largest IoU.
        ignore_iof_thr: where above 0, anchors of a greater IoF with a box to be ignored are.
        ignore_wrt_candidates: that IoF is over the area of the anchor, else of the box.
        match_low_quality: whether a box gets its best anchors.
        gpu_assign_thr: not needed and not used: memory is linear.
        iou_calculator: must be ``{"type": "BboxOverlaps2D"}``.
        perm_repeat_gt_cfg: must be None.

    Differs from mmdet's only in the overlaps: unions below 1e-6, which mmdet raises to that; half
    precision, in which mmdet computes areas; and NaN coordinates, which mmdet spreads over all
    anchors, and which here match nothing. Else the answer is the same, bit for bit.
    """

    def __init__(
        self,
        pos_iou_thr: float,
        neg_iou_thr: float | tuple[float, float],
        min_pos_iou: float = 0.0,
        gt_max_assign_all: bool = True,
        ignore_iof_thr: float = -1,
        ignore_wrt_candidates: bool = True,
        match_low_quality: bool = True,
        gpu_assign_thr: float = -1,
        iou_calculator: dict[str, Any] | None = None,
        perm_repeat_gt_cfg: None = None,
    ):
        if not gt_max_assign_all:
            raise ValueError(f"gt_max_assign_all must be True, got {gt_max_assign_all!r}")
        if iou_calculator not in (None, {"type": "BboxOverlaps2D"}):
            raise ValueError(
                f"iou_calculator must be {{'type': 'BboxOverlaps2D'}}, got {iou_calculator!r}"
            )
        if perm_repeat_gt_cfg is not None:
            raise ValueError(f"perm_repeat_gt_cfg must be None, got {perm_repeat_gt_cfg!r}")
        self.pos_iou_thr = pos_iou_thr
        self.neg_iou_thr = neg_iou_thr
        self.min_pos_iou = min_pos_iou
        self.gt_max_assign_all = gt_max_assign_all
        self.ignore_iof_thr = ignore_iof_thr
        self.ignore_wrt_candidates = ignore_wrt_candidates
        self.match_low_quality = match_low_quality
        self.gpu_assign_thr = gpu_assign_thr

    def assign(
        self, pred_instances: Any, gt_instances: Any, gt_instances_ignore: Any = None, **_: Any
    ) -> AssignResult:
        """Assign a box, the background or nothing to each anchor.

        Args:
            pred_instances: an object with ``priors``, [N, 4], or [N, 5] with scores, not read.
            gt_instances: an object with ``bboxes``, [M, 4], and ``labels``, [M].
            gt_instances_ignore: None, or an object with ``bboxes``, [K, 4].

        Returns:
            ``num_gts``, M; ``gt_inds``, int64 [N], 0 for background, -1 for ignored, else the index
            of the box plus 1; ``max_overlaps``, [N]; ``labels``, int64 [N], -1 without a box.
        """
        return AssignResult(*assign(self, pred_instances, gt_instances, gt_instances_ignore))


def assign(
    self: Any, pred_instances: Any, gt_instances: Any, gt_instances_ignore: Any = None
) -> tuple[int, Tensor, Tensor, Tensor]:
    """``assign`` of any object with the attributes of :class:`MaxIoUAssigner`."""
    priors, gt = _tensor(pred_instances.priors), _tensor(gt_instances.bboxes)
    labels = gt_instances.labels
    dtype = torch.promote_types(priors.dtype, gt.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    priors, gt = priors.to(dtype), gt.to(dtype)
    ignored = None
    if gt_instances_ignore is not None and self.ignore_iof_thr > 0:
        regions = _tensor(gt_instances_ignore.bboxes)
        if regions.numel() and priors.numel():
            regions = regions.to(dtype)
            if self.ignore_wrt_candidates:
                covered = _native_box_iou(priors, regions, mode="iof").amax(1)
            else:
                covered = _native_box_iou(regions, priors, mode="iof").amax(0)
            ignored = covered > self.ignore_iof_thr
            # A point intersects nothing, so it is no box's best anchor.
            priors = priors.masked_fill(ignored[:, None], 0)
    low, high = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0.0, self.neg_iou_thr)
    matched, overlaps = box_match(
        priors,
        gt,
        pos_iou=self.pos_iou_thr,
        neg_iou=high,
        min_pos_iou=self.min_pos_iou,
        match_low_quality=self.match_low_quality,
    )
    gt_inds = torch.where(matched == -2, -1, matched + 1)
    overlaps = overlaps.to(dtype)
    if gt.shape[0]:
        if low > 0:
            gt_inds = gt_inds.masked_fill((gt_inds == 0) & (overlaps < low), -1)
        if ignored is not None:
            gt_inds = gt_inds.masked_fill(ignored, -1)
            overlaps = overlaps.masked_fill(ignored, -1)
        found = labels[(gt_inds - 1).clamp(min=0)].to(torch.int64)
        assigned = torch.where(gt_inds > 0, found, -1)
    else:
        assigned = torch.full_like(gt_inds, -1)
    return gt.shape[0], gt_inds, overlaps, assigned


def _tensor(boxes: Any) -> Tensor:
    """The boxes of a tensor, or of mmdet's ``BaseBoxes``, without a score; none of any shape."""
    tensor: Tensor = getattr(boxes, "tensor", boxes)
    return tensor[..., :4] if tensor.numel() else tensor.reshape(-1, 4)
