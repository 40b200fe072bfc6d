"""Soft non-maximum suppression by its sequential definition, with scores in float64.

The IoU is that of IEEE arithmetic in the dtype of the boxes (float32 for halves), as in ``nms``: a
comparison with the threshold belongs to the meaning of the op.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _iou(box: Array, boxes: Array, offset: int) -> Array:
    """IoU of [4] with [N, 4]; NaN becomes 0."""
    one = boxes.dtype.type(offset)
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + one
    inter = np.maximum(sides[:, 0], 0) * np.maximum(sides[:, 1], 0)
    area = (box[2] - box[0] + one) * (box[3] - box[1] + one)
    areas = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
    return np.nan_to_num(inter / (area + areas - inter), nan=0.0)


def soft_nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "gaussian",
    *,
    idxs: Array | None = None,
    offset: int = 0,
    max_output: int | None = None,
) -> tuple[Array, Array]:
    """Indices int64 [K] and scores float64 [K]; arguments as in ``dlops_triton.soft_nms``."""
    boxes = boxes.astype(np.float64 if boxes.dtype == np.float64 else np.float32)
    largest = np.finfo(np.float64 if scores.dtype == np.float64 else np.float32).max
    current = np.minimum(scores.astype(np.float64), largest)
    lowest, threshold = np.float32(score_threshold), np.float32(iou_threshold)
    # What is not above the threshold now never will be.
    waiting = current > lowest
    indices: list[int] = []
    emitted: list[float] = []
    with np.errstate(all="ignore"):
        while waiting.any() and (max_output is None or len(indices) < max_output):
            left = np.flatnonzero(waiting)
            best = left[np.argmax(current[left])]
            indices.append(int(best))
            emitted.append(float(current[best]))
            waiting[best] = False
            same = waiting if idxs is None else waiting & (idxs == idxs[best])
            (others,) = np.nonzero(same)
            iou = _iou(boxes[best], boxes[others], offset)
            if method == "gaussian":
                factor = np.exp(-(iou.astype(np.float64) ** 2) / sigma)
            else:
                left_over = 1 - iou.astype(np.float64) if method == "linear" else 0.0
                factor = np.where(iou > threshold, left_over, 1.0)
            current[others] *= factor
            waiting &= current > lowest
    return np.array(indices, np.int64), np.array(emitted)


def soft_nms_padded(
    boxes: Array,
    scores: Array,
    *options: Any,
    idxs: Array | None = None,
    valid: Array | None = None,
    offset: int = 0,
    max_output: int,
) -> tuple[Array, Array, Array]:
    """Indices int64 and scores [B, max_output], padded with -1, and counts int32 [B]."""
    indices = np.full((len(boxes), max_output), -1, np.int64)
    emitted = np.full((len(boxes), max_output), -1.0)
    counts = np.zeros(len(boxes), np.int32)
    for b in range(len(boxes)):
        part = slice(None if valid is None else max(0, int(valid[b])))
        kept, values = soft_nms(
            boxes[b, part],
            scores[b, part],
            *options,
            idxs=None if idxs is None else idxs[b, part],
            offset=offset,
            max_output=max_output,
        )
        indices[b, : len(kept)] = kept
        emitted[b, : len(kept)] = values
        counts[b] = len(kept)
    return indices, emitted, counts
