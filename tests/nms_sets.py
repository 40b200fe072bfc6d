"""Sets of boxes with everything that goes wrong, and NMS by its definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
THRESHOLDS = [0.0, 0.5, 1.0, 0.3]


def greedy(
    boxes: Array,
    scores: Array,
    idxs: Array,
    threshold: float,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> list[int]:
    """The definition, box by box, on the whole fp32 IoU matrix."""
    boxes = boxes.astype(np.float64 if boxes.dtype == np.float64 else np.float32)
    with np.errstate(all="ignore"):
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        one = boxes.dtype.type(offset)
        sides = np.maximum(high - low + one, 0)
        inter = sides[..., 0] * sides[..., 1]
        area = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
        over = inter / (area[:, None] + area[None, :] - inter) > np.float32(threshold)
    over &= idxs[:, None] == idxs[None, :]
    order = sorted(range(len(boxes)), key=lambda i: (math.isnan(scores[i]), -scores[i]))
    if score_threshold is not None:
        order = [i for i in order if scores[i] > score_threshold]
    kept: list[int] = []
    fallen = np.zeros(len(boxes), bool)
    for i in order:
        if not fallen[i]:
            kept.append(i)
            fallen |= over[i]
    return kept[:max_output]


def random_set(seed: int, largest: int) -> tuple[Array, Array, Array, float]:
    """Boxes with everything that goes wrong, scores with ties, classes, a threshold."""
    rng = np.random.default_rng(seed)
    n = int(largest * rng.random() ** 5 + rng.integers(0, 3))
    spread = 10 ** rng.uniform(0.5, 3)
    corner = rng.uniform(-spread, spread, (n, 2))
    boxes = np.concatenate([corner, corner + rng.exponential(20, (n, 2))], 1)
    if rng.random() < 0.5:
        boxes = boxes.round()  # ties in the IoU itself, zero areas
    for share, spoil in (
        (0.1, lambda b: b[rng.integers(0, n, len(b)) % max(len(b), 1)]),  # duplicates
        (0.05, lambda b: b[:, [0, 1, 0, 3]]),  # zero area
        (0.05, lambda b: b[:, [2, 1, 0, 3]]),  # inverted in x
        (0.03, lambda b: b[:, [2, 3, 0, 1]]),  # inverted in both
        (0.03, lambda b: np.where(rng.random(b.shape) < 0.3, np.nan, b)),
        (0.03, lambda b: np.where(rng.random(b.shape) < 0.3, np.inf, b)),
        (0.03, lambda b: np.where(rng.random(b.shape) < 0.3, -np.inf, b)),
        (0.03, lambda b: b * 1e30),
    ):
        if rng.random() < 0.5:
            rows = rng.random(n) < share
            boxes[rows] = spoil(boxes[rows])
    if n and rng.random() < 0.5:
        boxes = boxes[rng.integers(0, n, n)]
    scores = rng.normal(size=n)
    if rng.random() < 0.5:
        scores = (scores * 3).round() / 3  # ties, zeros of both signs
    if rng.random() < 0.3:
        scores[rng.random(n) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
    classes = int(rng.choice([1, 2, 10, 80, 300]))
    idxs = rng.integers(-3, classes - 3, n) * int(rng.choice([1, 2**33]))
    threshold = float(rng.choice(THRESHOLDS))
    return boxes.astype(np.float32), scores.astype(np.float32), idxs, threshold
