"""Greedy non-maximum suppression, class by class, in the arithmetic of the boxes.

float64 is compared in float64, all else in float32: the outcome of a comparison with a threshold
belongs to the meaning of the op, so it is computed here exactly as on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _keep(boxes: Array, iou_threshold: np.floating[Any], offset: int) -> Array:
    """Which of boxes [N, 4], best first, are kept: bool [N]."""
    one = boxes.dtype.type(offset)
    areas = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
    keep = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if not keep[i]:
            continue
        rest = boxes[i + 1 :]
        w = np.minimum(boxes[i, 2], rest[:, 2]) - np.maximum(boxes[i, 0], rest[:, 0]) + one
        h = np.minimum(boxes[i, 3], rest[:, 3]) - np.maximum(boxes[i, 1], rest[:, 1]) + one
        inter = np.maximum(w, 0) * np.maximum(h, 0)
        keep[i + 1 :] &= ~(inter / (areas[i] + areas[i + 1 :] - inter) > iou_threshold)
    return keep


def nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float,
    *,
    idxs: Array | None = None,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Array:
    """Indices of the kept boxes, best first, int64 [K]; arguments as in ``dlops_triton.nms``."""
    boxes = boxes.astype(np.float64 if boxes.dtype == np.float64 else np.float32)
    scores = scores.astype(np.float64 if scores.dtype == np.float64 else np.float32)
    # Negated, so that a stable ascending sort puts the best first and NaN last.
    order = np.argsort(0 - scores, kind="stable")
    if score_threshold is not None:
        order = order[scores[order] > score_threshold]
    keep = np.zeros(len(order), bool)
    if idxs is None:
        groups = [np.arange(len(order))]
    else:
        by_class = np.argsort(idxs[order], kind="stable")
        ids = idxs[order][by_class]
        groups = np.split(by_class, np.flatnonzero(ids[1:] != ids[:-1]) + 1)
    with np.errstate(all="ignore"):
        for group in groups:
            keep[group] = _keep(boxes[order[group]], np.float32(iou_threshold), offset)
    return order[keep][:max_output].astype(np.int64)


def nms_padded(
    boxes: Array,
    scores: Array,
    iou_threshold: float,
    *,
    idxs: Array | None = None,
    valid: Array | None = None,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int,
) -> tuple[Array, Array]:
    """Indices int64 [B, max_output], padded with -1, and counts int32 [B], image by image."""
    indices = np.full((len(boxes), max_output), -1, np.int64)
    counts = np.zeros(len(boxes), np.int32)
    for b in range(len(boxes)):
        part = slice(None if valid is None else max(0, int(valid[b])))
        kept = nms(
            boxes[b, part],
            scores[b, part],
            iou_threshold,
            idxs=None if idxs is None else idxs[b, part],
            offset=offset,
            score_threshold=score_threshold,
            max_output=max_output,
        )
        indices[b, : len(kept)] = kept
        counts[b] = len(kept)
    return indices, counts
