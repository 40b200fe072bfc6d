"""The launchers of NMS: which kernels choose the boxes, and what torch does around them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _dispatch
from ._settings import Settings
from .kernels.nms import (
    nms_list_kernel,
    nms_mask_kernel,
    nms_resolve_kernel,
    nms_segments_kernel,
    nms_small_kernel,
    nms_suppress_kernel,
)

# The defaults are the best of a few on an H200. BLOCK is how many boxes one program decides at a
# time; the resolver walks the bitmask in the blocks that it was written in.
SMALL = Settings(
    "nms_small",
    fp32={"BLOCK": 256, "ROWS": 4, "num_warps": 4},
    fp64={"BLOCK": 256, "ROWS": 1, "num_warps": 4},
)
SEGMENTS = Settings(
    "nms_segments",
    fp32={"BLOCK": 256, "ROWS": 4, "CHUNK": 64, "num_warps": 2},
    fp64={"BLOCK": 256, "ROWS": 1, "CHUNK": 64, "num_warps": 4},
)
MASK = Settings("nms_mask", fp32={"BLOCK": 1024, "ROWS": 4, "num_warps": 8})
RESOLVE = Settings("nms_resolve", fp32={"WORDS": 16, "num_warps": 8})
SUPPRESS = Settings(
    "nms_suppress",
    fp32={"BLOCK": 512, "ROWS": 4, "SHARE": 128, "num_warps": 4},
    fp64={"BLOCK": 256, "ROWS": 4, "SHARE": 128, "num_warps": 4},
)
_LISTED_BY_ONE = 1024  # a copy: nothing to tune

# So many boxes can one program sort. On an H200 the bitmask takes less of the device's time from
# some 700 boxes on (1,000: 48 against 77 us), but its 20 launches take the host 300 us more.
SORTED_BY_ONE = 2048
ONE_BAND = 24_576
# Longer segments of unknown number are chosen by all multiprocessors together, one after another.
LARGEST_SEGMENT = 4096
# A band's bitmask has up to so many bytes per box of all.
MASK_BYTES = 24


class Options(NamedTuple):
    iou_threshold: float
    offset: int
    score_threshold: float | None
    max_output: int


def small(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, valid: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Tier 1 of small images [B, N, 4]: all in one kernel. Padded indices and their counts."""
    images, n = scores.shape
    threshold, offset, score_threshold, max_output = options
    order = boxes.new_empty((images, n), dtype=torch.int64)
    row = boxes.new_empty((images, n + 31, 4), dtype=_dispatch.compute_dtype(boxes.dtype))
    indices = boxes.new_empty((images, max_output), dtype=torch.int64)
    counts = boxes.new_empty(images, dtype=torch.int32)
    _dispatch.launch(
        nms_small_kernel,
        (images,),
        boxes.contiguous(),
        scores.contiguous(),
        None if idxs is None else idxs.contiguous(),
        None if valid is None else valid.contiguous(),
        order,
        row,
        indices,
        counts,
        n,
        max_output,
        threshold,
        score_threshold,
        OFFSET=offset,
        SIZE=next(size for size in (256, 512, 1024, 2048) if n <= size),
        enable_fp_fusion=False,
        **SMALL.on(boxes),
    )
    return indices, counts


def is_small(scores: Tensor) -> bool:
    """Whether one program is to sort each image. It has 32 bits for a score."""
    return scores.shape[1] <= SORTED_BY_ONE and scores.dtype != torch.float64


def takes_bands(n: int, max_output: int) -> bool:
    """Whether images are better chosen one after another, each by all multiprocessors."""
    return n > LARGEST_SEGMENT and max_output > 1024


class Sorted(NamedTuple):
    """[B, N] each: indices, best first, and which of them take part; all do if that is None."""

    order: Tensor
    alive: Tensor | None


def by_score(scores: Tensor, valid: Tensor | None, score_threshold: float | None) -> Sorted:
    """Sort each image. What takes no part comes last."""
    # What torch makes of it keeps its layout, on which the kernels rely.
    scores = scores.to(_dispatch.compute_dtype(scores.dtype)).contiguous()
    last = scores != scores
    if valid is not None:
        last |= torch.arange(scores.shape[1], device=scores.device) >= valid[:, None]
    # Negated, so that a stable ascending sort puts the best first and NaN last, whose sign a radix
    # sort would heed; 0 - x has no -0.0.
    key = (0 - scores).masked_fill_(last, float("nan"))
    negated, order = torch.sort(key, stable=True)
    alive = None
    if score_threshold is not None:
        alive = negated < -score_threshold
    elif valid is not None:
        alive = order < valid[:, None]
    return Sorted(order, alive)


def segments(
    boxes: Tensor,
    idxs: Tensor | None,
    ranked: Sorted,
    options: Options,
    largest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tier 1 of sorted images: a program per segment.

    Returns bool [B, N], which boxes are kept, in order of score; and int32 [1], whether there are
    segments of more than ``largest`` boxes, of which none is kept so far.
    """
    images, n = ranked.order.shape
    order, alive, ids = *ranked, None
    if idxs is None:
        order = order.clone()  # to be overwritten
    else:
        ids, place = torch.sort(idxs.contiguous().gather(1, order), stable=True)
        order = order.gather(1, place)
        alive = None if alive is None else alive.gather(1, place)
    settings = SEGMENTS.on(boxes)
    chunks = 1 if ids is None else _dispatch.cdiv(n, settings["CHUNK"])
    row = boxes.new_empty((images * n + 31, 4), dtype=_dispatch.compute_dtype(boxes.dtype))
    keep = torch.zeros((images, n), dtype=torch.int8, device=boxes.device)
    is_large = torch.zeros(1, dtype=torch.int32, device=boxes.device)
    _dispatch.launch(
        nms_segments_kernel,
        (images * chunks,),
        boxes.contiguous(),
        ids,
        order,
        row,
        None if alive is None else alive.view(torch.int8),
        keep,
        is_large,
        n,
        chunks,
        min(options.max_output, n),
        n if largest is None else largest,
        options.iou_threshold,
        OFFSET=options.offset,
        enable_fp_fusion=False,
        **settings,
    )
    return keep.gather(1, ranked.order).view(torch.bool), is_large


def large_segments(
    boxes: Tensor, idxs: Tensor | None, ranked: Sorted, keep: Tensor, largest: int, options: Options
) -> None:
    """Choose what :func:`segments` left out, of one image; in ``keep``, in order of score."""
    order, alive = ranked
    ids = torch.zeros_like(order[0]) if idxs is None else idxs[0].gather(0, order[0])
    ids, place = torch.sort(ids, stable=True)
    if alive is not None:
        taking_part = alive[0].gather(0, place)
        ids, place = ids[taking_part], place[taking_part]
    sizes = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    start = 0
    for size in sizes:
        if size > largest:
            segment = place[start : start + size]
            chosen = torch.ones(size, dtype=torch.bool, device=boxes.device)
            bands(boxes[0, order[0, segment]], chosen, options)
            keep[0, segment] = chosen
        start += size


def band(n: int) -> int:
    """How many of n boxes share a bitmask; a multiple of every BLOCK if not all."""
    if n <= ONE_BAND:
        return n
    return max(1024, int(math.sqrt(8 * MASK_BYTES * n)) // 1024 * 1024)


def bands(boxes: Tensor, keep: Tensor, options: Options) -> None:
    """Tiers 2 and 3: strike out of ``keep`` (bool [N]) the boxes that fall.

    Boxes [N, 4] contiguous, best first. What is not in ``keep`` takes no part.
    """
    n = boxes.shape[0]
    masking, resolving = MASK.on(boxes), RESOLVE.on(boxes)
    block, width = masking["BLOCK"], band(n)
    words, stride = _dispatch.cdiv(width, 32), _dispatch.cdiv(width, block) * block
    mask = boxes.new_empty((words, stride), dtype=torch.int32)
    packed = boxes.new_empty(words, dtype=torch.int32)
    row = None
    if width < n:
        row = boxes.new_empty((width, 4), dtype=_dispatch.compute_dtype(boxes.dtype))
    count = boxes.new_empty(1, dtype=torch.int32)
    flags = keep.view(torch.int8)
    for start in range(0, n, width):
        end = min(start + width, n)
        size = end - start
        grid = (_dispatch.cdiv(size, block), _dispatch.cdiv(size, 32))
        _dispatch.launch(
            nms_mask_kernel,
            grid,
            *(boxes, mask, start, size, stride, options.iou_threshold),
            OFFSET=options.offset,
            enable_fp_fusion=False,
            **masking,
        )
        _dispatch.launch(
            nms_resolve_kernel,
            (1,),
            *(boxes, mask, flags, packed, row if end < n else None, count, start, size, stride),
            BLOCK=block,
            enable_fp_fusion=False,
            **resolving,
        )
        if end < n:
            suppressing = SUPPRESS.on(boxes)
            later = _dispatch.cdiv(n - end, suppressing["BLOCK"])
            _dispatch.launch(
                nms_suppress_kernel,
                (later, _dispatch.cdiv(size, suppressing["SHARE"])),
                *(boxes, flags, row, count, end, n, options.iou_threshold),
                OFFSET=options.offset,
                enable_fp_fusion=False,
                **suppressing,
            )


def listed(order: Tensor, keep: Tensor, max_output: int) -> tuple[Tensor, Tensor]:
    """The first ``max_output`` kept of each image [B, N], padded with -1, and their counts."""
    images, n = order.shape
    indices = order.new_full((images, max_output), -1)
    counts = order.new_empty(images, dtype=torch.int32)
    blocks = _dispatch.cdiv(n, _LISTED_BY_ONE)
    _dispatch.launch(
        nms_list_kernel,
        (images * blocks,),
        order,
        keep.view(torch.int8),
        keep.cumsum(1, dtype=torch.int32),
        indices,
        counts,
        n,
        blocks,
        max_output,
        BLOCK=_LISTED_BY_ONE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return indices, counts
