"""Assignment of anchors to ground truth by IoU, one ground-truth box at a time.

float64 is compared in float64, all else in float32: the outcome of a comparison with a threshold
belongs to the meaning of the op, so it is computed here exactly as on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _iou(anchors: Array, areas: Array, box: Array) -> Array:
    """[N] IoU with one box: 0 where the union is 0, NaN where it is undefined."""
    w = np.minimum(anchors[:, 2], box[2]) - np.maximum(anchors[:, 0], box[0])
    h = np.minimum(anchors[:, 3], box[3]) - np.maximum(anchors[:, 1], box[1])
    inter = np.maximum(w, 0) * np.maximum(h, 0)
    union = areas + (box[2] - box[0]) * (box[3] - box[1]) - inter
    return np.where(union == 0, 0, inter / union)


def box_match(
    anchors: Array,
    gt: Array,
    *,
    pos_iou: float,
    neg_iou: float,
    min_pos_iou: float,
    match_low_quality: bool,
    gt_valid: Array | None = None,
) -> tuple[Array, Array]:
    """Matches int64 [N] and largest IoUs [N] of one image; arguments as in ``box_match``."""
    dtype: Any = np.float64 if anchors.dtype == np.float64 else np.float32
    anchors, gt = anchors.astype(dtype), gt.astype(dtype)
    best = np.full(len(anchors), -1, dtype)  # less than any IoU
    index = np.full(len(anchors), -1)
    low_quality = np.full(len(anchors), -1)
    with np.errstate(all="ignore"):
        areas = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
        for g, box in enumerate(gt):
            if gt_valid is not None and not gt_valid[g]:
                continue
            iou = _iou(anchors, areas, box)
            better = iou > best
            best[better], index[better] = iou[better], g
            largest = np.fmax.reduce(iou, initial=0)
            if largest >= np.float32(min_pos_iou):
                low_quality[iou == largest] = g
    matched = np.full(len(anchors), -2)
    matched[best < np.float32(neg_iou)] = -1  # where there is no IoU, too
    positive = best >= np.float32(pos_iou)
    matched[positive] = index[positive]
    if match_low_quality:
        matched = np.where(low_quality >= 0, low_quality, matched)
    return matched, np.where(best > 0, best, dtype(0))
