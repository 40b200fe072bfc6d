"""Non-maximum suppression: the public functions and their launcher."""

from __future__ import annotations

import numpy as np
import torch
import triton
from torch import Tensor

from . import _checks, _dispatch
from ._settings import Settings
from .kernels.nms import nms_mask_kernel, nms_resolve_kernel, nms_suppress_kernel
from .reference import nms as reference

# A band's bitmask takes BAND^2 / 8 bytes, here 32 MiB. BAND is a multiple of every BLOCK.
BAND = 16384
# The defaults are predicted. BLOCK is how many boxes one program decides at a time; the resolver
# walks the bitmask in the blocks that it was written in.
MASK = Settings("nms_mask", fp32={"BLOCK": 512, "ROWS": 4, "num_warps": 4})
RESOLVE = Settings("nms_resolve", fp32={"WORDS": 16, "num_warps": 8})
SUPPRESS = Settings(
    "nms_suppress",
    fp32={"BLOCK": 512, "ROWS": 4, "WORDS": 64, "num_warps": 4},
    fp64={"BLOCK": 256, "ROWS": 4, "WORDS": 64, "num_warps": 4},
)


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
    Bitwise deterministic. Memory is O(N) above 16,384 boxes. The host waits once, for K.
    """
    return _checked(boxes, scores, None, iou_threshold, offset, score_threshold, max_output)


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
    """
    _checks.tensor("idxs", idxs)
    return _checked(boxes, scores, idxs, iou_threshold, offset, score_threshold, max_output)


def _checked(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int | None,
) -> Tensor:
    _checks.boxes("boxes", boxes)
    _checks.tensor("scores", scores)
    _checks.dtype("scores", scores)
    for name, value in (("scores", scores), ("idxs", idxs)):
        if value is None:
            continue
        if tuple(value.shape) != (boxes.shape[0],):
            raise ValueError(
                f"{name} must have shape ({boxes.shape[0]},), one per box, got {tuple(value.shape)}"
            )
        _checks.same_device(name, value, "boxes", boxes)
    if idxs is not None:
        _checks.dtype("idxs", idxs, (torch.int64, torch.int32))
    _checks.number("iou_threshold", iou_threshold, 0, 1, "in [0, 1]")
    _checks.choice("offset", offset, (0, 1))
    if score_threshold is not None:
        _checks.number("score_threshold", score_threshold, -float("inf"), float("inf"), "finite")
        score_threshold = float(score_threshold)
        if scores.dtype != torch.float64:
            largest = np.finfo(np.float32).max
            score_threshold = float(np.float32(np.clip(score_threshold, -largest, largest)))
    if max_output is not None:
        _checks.integer("max_output", max_output, 0, 2**63 - 1, "None or an integer of at least 0")
        max_output = int(max_output) if isinstance(max_output, np.integer) else max_output
    indices: Tensor = _nms(
        boxes.detach(),
        scores.detach(),
        idxs,
        float(np.float32(iou_threshold)),
        int(offset),
        score_threshold,
        max_output,
    )
    return indices


def _launch(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float | None,
    max_output: int | None,
) -> Tensor:
    n = boxes.shape[0]
    if n == 0:
        return boxes.new_empty(0, dtype=torch.int64)
    scores = scores.to(_dispatch.compute_dtype(scores.dtype))
    # Negated, so that a stable ascending sort puts the best first and NaN last, whose sign a radix
    # sort would heed; 0 - x has no -0.0.
    key = torch.where(scores == scores, 0 - scores, float("nan"))
    negated, order = torch.sort(key, stable=True)
    if score_threshold is None:
        keep = torch.ones_like(order, dtype=torch.bool)
    else:
        keep = negated < -score_threshold
    ids = None if idxs is None else idxs.index_select(0, order)
    _suppress(boxes.index_select(0, order), ids, keep.view(torch.int8), iou_threshold, offset)
    return order.masked_select(keep)[:max_output]


def _suppress(
    boxes: Tensor, ids: Tensor | None, keep: Tensor, iou_threshold: float, offset: int
) -> None:
    """Clear in ``keep`` (int8 [N]) the boxes that fall. Boxes, best first, and ids contiguous."""
    n = boxes.shape[0]
    masking, resolving = MASK.on(boxes), RESOLVE.on(boxes)
    block = masking["BLOCK"]
    size = min(n, BAND)
    words = triton.cdiv(size, 32)
    stride = triton.cdiv(size, block) * block
    mask = boxes.new_empty((words, stride), dtype=torch.int32)
    kept = boxes.new_empty(words, dtype=torch.int32)
    for start in range(0, n, BAND):
        end = min(start + BAND, n)
        size = end - start
        words = triton.cdiv(size, 32)
        _dispatch.launch(
            nms_mask_kernel,
            (triton.cdiv(size, block), words),
            boxes,
            ids,
            mask,
            start,
            size,
            stride,
            iou_threshold,
            OFFSET=offset,
            enable_fp_fusion=False,
            **masking,
        )
        _dispatch.launch(
            nms_resolve_kernel,
            (1,),
            mask,
            keep,
            kept,
            start,
            size,
            stride,
            BLOCK=block,
            enable_fp_fusion=False,
            **resolving,
        )
        if end < n:
            suppressing = SUPPRESS.on(boxes)
            grid = (
                triton.cdiv(n - end, suppressing["BLOCK"]),
                triton.cdiv(words, suppressing["WORDS"]),
            )
            _dispatch.launch(
                nms_suppress_kernel,
                grid,
                boxes,
                ids,
                keep,
                kept,
                start,
                end,
                n,
                iou_threshold,
                OFFSET=offset,
                enable_fp_fusion=False,
                **suppressing,
            )


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


def _fake(boxes: Tensor, *_: object) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(size, dtype=torch.int64)


_nms = _dispatch.register(
    "nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, int offset, "
    "float? score_threshold, SymInt? max_output) -> Tensor",
    _launch,
    _reference,
    _fake,
)
