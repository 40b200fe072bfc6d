"""Non-maximum suppression: the public functions and their launcher."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks, _dispatch, _nms, _vmap
from .reference import nms as reference


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    """Greedy non-maximum suppression: keep the best box, drop what overlaps it, and so on.

    A drop-in for ``torchvision.ops.nms``. The answer is exact: the same indices on every device.

    Args:
        boxes: [N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64, any strides.
        scores: [N], floating point.
        iou_threshold: in [0, 1], rounded to fp32. A box is dropped when its IoU with a kept box is
            strictly greater.
        offset: 1 adds 1 to every width and height (inclusive pixel coordinates).
        score_threshold: only boxes with a strictly greater score take part; rounded to fp32 unless
            the scores are fp64.
        max_output: at most so many indices are returned, the best ones.

    Returns:
        int64 [K], indices into ``boxes`` by descending score; equal scores in order of index, NaN
        scores last.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, named
            in the message with its value.

    IoU is IEEE fp32 arithmetic (fp64 for fp64 boxes). A box whose area, or a pair whose IoU, is
    NaN (NaN or infinite coordinates, two boxes without area) neither suppresses nor is suppressed.
    Bitwise deterministic. Memory is O(N): up to 24,576 boxes share a bitmask, of more each band
    has one. The host waits once, for K; :func:`nms_padded` never waits.
    """
    _checks.boxes("boxes", boxes)
    _checks.detections(boxes, scores)
    options = _options(scores, iou_threshold, offset, score_threshold, max_output)
    indices: Tensor = _op(boxes.detach(), scores.detach(), None, *options)
    return indices


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    """:func:`nms` in which boxes only suppress boxes of their own class (or image).

    A drop-in for ``torchvision.ops.batched_nms``. Classes are compared, not shifted apart by an
    offset of the coordinates, so negative, huge or infinite coordinates and any number of classes
    give the exact answer, that of :func:`nms` on each class alone.

    Args:
        boxes, scores, iou_threshold, offset, score_threshold, max_output: as in :func:`nms`;
            ``max_output`` counts all classes together.
        idxs: [N] class of each box, int32 or int64, any values.

    Returns:
        int64 [K], indices into ``boxes`` by descending score over all classes.

    The host waits once, for K; a few times where a class has more than 4,096 boxes, which all
    multiprocessors then choose together, class after class.
    """
    _checks.boxes("boxes", boxes)
    _checks.tensor("idxs", idxs)
    _checks.detections(boxes, scores, idxs)
    options = _options(scores, iou_threshold, offset, score_threshold, max_output)
    indices: Tensor = _op(boxes.detach(), scores.detach(), idxs, *options)
    return indices


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    valid: Tensor | None = None,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int,
) -> tuple[Tensor, Tensor]:
    """:func:`nms`, or :func:`batched_nms`, of several images at once, in a fixed amount of memory.

    Nothing waits for the GPU and no shape depends on data, so it can be captured in a CUDA graph,
    compiled with fullgraph, exported and vmapped.

    Args:
        boxes: [B, N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64, any strides.
        scores: [B, N], floating point.
        iou_threshold, offset, score_threshold: as in :func:`nms`.
        idxs: [B, N] class of each box, int32 or int64, any values: only boxes of the same image
            and class suppress one another.
        valid: [B] int32 or int64: only the first so many boxes of an image take part. Below 0 it
            counts as 0, above N as N.
        max_output: room for so many indices per image, all classes together.

    Returns:
        indices: int64 [B, max_output], of boxes of the image, by descending score; equal scores in
            order of index, NaN scores last; then -1.
        counts: int32 [B], how many they are.

    Raises:
        TypeError, ValueError: as :func:`nms` does.

    The indices are those of :func:`nms` (of :func:`batched_nms` with ``idxs``) on each image alone.
    Bitwise deterministic, no host synchronisation.
    """
    _checks.images("boxes", boxes)
    _checks.detections(boxes, scores, idxs, valid)
    _checks.integer("max_output", max_output, 0, 2**31 - 1, "an integer in [0, 2**31)")
    options = _options(scores, iou_threshold, offset, score_threshold, max_output)
    padded: tuple[Tensor, Tensor] = _padded_op(
        boxes.detach(), scores.detach(), idxs, valid, *options
    )
    return padded


def _options(
    scores: Tensor,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int | None,
) -> tuple[float, int, float | None, int | None]:
    """What NMS is asked for, checked and as the ops take it."""
    _checks.number("iou_threshold", iou_threshold, 0, 1, "in [0, 1]")
    _checks.choice("offset", offset, (0, 1))
    if score_threshold is not None:
        score_threshold = _checks.score_threshold(score_threshold, scores)
    if max_output is not None:
        _checks.integer("max_output", max_output, 0, 2**63 - 1, "None or an integer of at least 0")
        max_output = int(max_output) if isinstance(max_output, np.integer) else max_output
    return float(np.float32(iou_threshold)), int(offset), score_threshold, max_output


def _launch(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int | None,
    tier: str | None = None,
) -> Tensor:
    n = boxes.shape[0]
    if n == 0:
        return boxes.new_empty(0, dtype=torch.int64)
    most = n if max_output is None else min(max_output, n)
    options = _nms.Options(iou_threshold, offset, score_threshold, most)
    boxes, scores = boxes[None], scores[None]
    idxs = None if idxs is None else idxs[None]
    if tier is None:
        tier = "small" if _nms.is_small(scores) else "bands" if idxs is None else "segments"
    if tier == "small":
        indices, counts = _nms.small(boxes, scores, idxs, None, options)
        return indices[0, : counts.item()]
    ranked = _nms.by_score(scores, None, score_threshold)
    order, alive = ranked
    if tier == "bands":
        keep = torch.ones_like(order, dtype=torch.bool) if alive is None else alive
        _nms.bands(boxes[0].index_select(0, order[0]), keep[0], options)
        return order.masked_select(keep)[:max_output]
    keep, is_large = _nms.segments(boxes, idxs, ranked, options, _nms.LARGEST_SEGMENT)
    indices, counts = _nms.listed(order, keep, most)
    count, more = torch.cat((counts, is_large)).tolist()
    if not more:
        return indices[0, :count]
    _nms.large_segments(boxes, idxs, ranked, keep, _nms.LARGEST_SEGMENT, options)
    return order.masked_select(keep)[:max_output]


def _reference(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int | None,
) -> Tensor:
    kept = reference.nms(
        _dispatch.to_numpy(boxes),
        _dispatch.to_numpy(scores),
        iou_threshold,
        idxs=None if idxs is None else _dispatch.to_numpy(idxs),
        offset=offset,
        score_threshold=score_threshold,
        max_output=max_output,
    )
    return _dispatch.from_numpy(kept, torch.int64)


def _launch_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int,
    tier: str | None = None,
) -> tuple[Tensor, Tensor]:
    n = scores.shape[1]
    if scores.numel() == 0 or max_output == 0:
        indices, counts = _alloc_padded(boxes, max_output)
        return indices.fill_(-1), counts.zero_()
    options = _nms.Options(iou_threshold, offset, score_threshold, max_output)
    if tier is None:
        tier = "small" if _nms.is_small(scores) else "segments"
        if idxs is None and _nms.takes_bands(n, max_output):
            tier = "bands"
    if tier == "small":
        return _nms.small(boxes, scores, idxs, valid, options)
    ranked = _nms.by_score(scores, valid, score_threshold)
    if tier == "segments":
        keep, _ = _nms.segments(boxes, idxs, ranked, options)
    else:
        order, alive = ranked
        keep = torch.ones_like(order, dtype=torch.bool) if alive is None else alive
        for image, order, kept in zip(boxes, ranked.order, keep, strict=True):
            _nms.bands(image.index_select(0, order), kept, options)
    return _nms.listed(ranked.order, keep, max_output)


def _reference_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int,
) -> tuple[Tensor, Tensor]:
    indices, counts = reference.nms_padded(
        _dispatch.to_numpy(boxes),
        _dispatch.to_numpy(scores),
        iou_threshold,
        idxs=None if idxs is None else _dispatch.to_numpy(idxs),
        valid=None if valid is None else _dispatch.to_numpy(valid),
        offset=offset,
        score_threshold=score_threshold,
        max_output=max_output,
    )
    return _dispatch.from_numpy(indices, torch.int64), _dispatch.from_numpy(counts, torch.int32)


def _alloc_padded(boxes: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    images, max_output = boxes.shape[0], options[-1]
    return (
        boxes.new_empty((images, max_output), dtype=torch.int64),
        boxes.new_empty(images, dtype=torch.int32),
    )


def _fake(boxes: Tensor, *_: object) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(size, dtype=torch.int64)


_op = _dispatch.register(
    "nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, int offset, "
    "float? score_threshold, SymInt? max_output) -> Tensor",
    _launch,
    _reference,
    _fake,
    vmap=_vmap.refused(
        "torch.vmap does not take nms, the size of whose result depends on data: nms_padded has a "
        "fixed size, and takes a batch of images"
    ),
)
_padded_op = _dispatch.register(
    "nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, Tensor? valid, float iou_threshold, "
    "int offset, float? score_threshold, SymInt max_output) -> (Tensor, Tensor)",
    _launch_padded,
    _reference_padded,
    _alloc_padded,
    vmap=_vmap.merged(4),
)
