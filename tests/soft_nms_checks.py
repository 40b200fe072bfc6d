"""Whether a Soft-NMS is right, to the rounding that the specification allows its scores."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlops_triton.reference import soft_nms as reference

Array = NDArray[Any]
ULP = 2.0**-23  # relative
STEP = 2.0**-149  # absolute, of subnormal scores


def check(
    got: tuple[list[int], Array],
    want: tuple[Array, Array],
    boxes: Array,
    idxs: Array | None = None,
    offset: int = 0,
) -> None:
    """The same indices, and scores within 4 ulp for every factor that they have."""
    indices, scores = want
    assert got[0] == indices.tolist()
    bounds = [
        bound(scores[k], factors(boxes, idxs, offset, indices[:k], i))
        for k, i in enumerate(indices)
    ]
    assert (np.abs(got[1] - scores) <= bounds).all()


def bound(score: float, decays: int) -> float:
    """How far rounding may take a score that so many factors have decayed."""
    return 4 * max(ULP * score, STEP) * decays


def factors(boxes: Array, idxs: Array | None, offset: int, picks: Array, i: int) -> int:
    """How many of the picks have decayed the score of box i."""
    overlapped = reference._iou(boxes[i], boxes[picks], offset) > 0
    if idxs is not None:
        overlapped &= idxs[picks] == idxs[i]
    return int(overlapped.sum())


def until_rounding_decides(
    got: tuple[list[int], Array],
    want: tuple[Array, Array],
    boxes: Array,
    scores: Array,
    idxs: Array | None,
    score_threshold: float,
    offset: int,
    **options: Any,
) -> tuple[tuple[list[int], Array], tuple[Array, Array]]:
    """Cut both where they first differ, if what they chose there differs by rounding alone."""
    indices = want[0].tolist()
    pairs = enumerate(itertools.zip_longest(got[0], indices))
    here = next((k for k, (a, b) in pairs if a != b), None)
    if here is None:
        return got, want
    current, bounds = [], []
    for i in (chosen[here] if here < len(chosen) else None for chosen in (got[0], indices)):
        if i is None:  # none was above the threshold
            current.append(float(np.float32(score_threshold)))
            continue
        # The definition's score of a box after the picks is what it has when they are alone.
        alone = np.sort([*indices[:here], i])
        ids = None if idxs is None else idxs[alone]
        order, emitted = reference.soft_nms(
            boxes[alone], scores[alone], 0.3, score_threshold=0, idxs=ids, offset=offset, **options
        )
        assert alone[order].tolist() == [*indices[:here], i]
        current.append(emitted[-1])
        decays = factors(boxes, idxs, offset, want[0][:here], i)
        bounds.append(bound(emitted[-1], decays))
    assert abs(current[0] - current[1]) <= sum(bounds)
    return (got[0][:here], got[1][:here]), (want[0][:here], want[1][:here])
