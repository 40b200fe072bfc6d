"""Assignment of anchors to ground-truth boxes: the public function and its launchers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _checks, _dispatch, _vmap
from ._settings import Settings
from .kernels.match import match_kernel, match_low_quality_kernel
from .reference import match as reference

# The defaults are predicted. With one warp nothing in a program waits for anything.
MATCH = Settings(
    "match",
    fp32={"BLOCK_N": 128, "BLOCK_M": 4, "num_warps": 1},
    fp64={"BLOCK_N": 64, "BLOCK_M": 2, "num_warps": 1},
)
LOW_QUALITY = Settings(
    "match_low_quality",
    fp32={"BLOCK_N": 128, "BLOCK_M": 4, "num_warps": 1},
    fp64={"BLOCK_N": 64, "BLOCK_M": 2, "num_warps": 1},
)


def box_match(
    anchors: Tensor,
    gt: Tensor,
    *,
    pos_iou: float = 0.5,
    neg_iou: float = 0.4,
    min_pos_iou: float = 0.0,
    match_low_quality: bool = True,
    gt_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Match every anchor with a ground-truth box by IoU, or with none.

    The rule of mmdet's ``MaxIoUAssigner`` with ``gt_max_assign_all=True``, its default, in memory
    O(N + M): the matrix of IoUs is never built.

    1. An anchor's best box is that of largest IoU, the first among equals.
    2. The anchor is matched with it where that IoU is at least ``pos_iou``, is negative where it is
       less than ``neg_iou``, and is ignored in between.
    3. With ``match_low_quality``, for each box in turn, whose largest IoU with any anchor is at
       least ``min_pos_iou``: every anchor with exactly that IoU is matched with this box, whatever
       it was before. So of several such boxes the last gets the anchor.

    Args:
        anchors: [N, 4] or [B, N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64. An [N, 4]
            beside a batch of boxes is every image's; like an expanded tensor it is read in place.
        gt: [M, 4] or [B, M, 4] ground-truth boxes, the same dtype and device.
        pos_iou, neg_iou, min_pos_iou: in [0, 1], ``neg_iou`` at most ``pos_iou``; rounded to fp32.
        match_low_quality: whether step 3 takes place.
        gt_valid: bool [M] or [B, M]; False marks padding, which matches nothing.

    Returns:
        ``(matched, max_iou)``: int64 [N] or [B, N], the index of the matched box, -1 for a negative
        anchor or -2 for an ignored one; and the anchor's largest IoU, fp32 (fp64 for fp64 boxes)
        [N] or [B, N]. Neither carries a gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    With ``min_pos_iou=0`` a box that intersects no anchor has the largest IoU 0, and step 3 gives
    it every anchor of IoU 0 with it, as in mmdet: a positive ``min_pos_iou`` prevents that. mmdet
    writes -1 for -2, 0 for -1, counts boxes from 1, and raises unions of less than 1e-6 to that.

    IoU is IEEE fp32 arithmetic (fp64 for fp64), 0 where the union is 0. A NaN IoU (NaN or infinite
    coordinates) is less than any other and matches nothing. An anchor without any IoU, as when no
    box is valid, is negative with ``max_iou`` 0. The answer is exact: the same on every device and
    in every run. No host synchronisation; can be captured in a CUDA graph.
    """
    _checks.boxes("anchors", anchors, batched=True)
    _checks.boxes("gt", gt, batched=True)
    for name, value in (("anchors", anchors), ("gt", gt)):
        if value.dim() > 3:
            raise ValueError(
                f"{name} must have at most one leading dimension, got shape {tuple(value.shape)}"
            )
    _checks.same_device("gt", gt, "anchors", anchors)
    if gt.dtype != anchors.dtype:
        raise TypeError(f"gt must have the dtype of anchors, {anchors.dtype}, got {gt.dtype}")
    if anchors.dim() == 2 and gt.dim() == 3:
        anchors = anchors.expand(gt.shape[0], *anchors.shape)
    if anchors.shape[:-2] != gt.shape[:-2]:
        raise ValueError(
            f"gt must have the leading dimension of anchors, got shapes {tuple(gt.shape)} and "
            f"{tuple(anchors.shape)}"
        )
    if gt_valid is not None:
        _checks.tensor("gt_valid", gt_valid)
        _checks.dtype("gt_valid", gt_valid, (torch.bool,))
        _checks.same_device("gt_valid", gt_valid, "anchors", anchors)
        if gt_valid.shape != gt.shape[:-1]:
            raise ValueError(
                f"gt_valid must have shape {tuple(gt.shape[:-1])}, one per box of gt, got "
                f"{tuple(gt_valid.shape)}"
            )
    for name, number in (("pos_iou", pos_iou), ("neg_iou", neg_iou), ("min_pos_iou", min_pos_iou)):
        _checks.number(name, number, 0, 1, "in [0, 1]")
    if neg_iou > pos_iou:
        raise ValueError(f"neg_iou must be at most pos_iou, {pos_iou!r}, got {neg_iou!r}")
    _checks.choice("match_low_quality", match_low_quality, (True, False))
    batched = gt.dim() == 3
    matched, max_iou = _match(
        anchors.detach() if batched else anchors.detach()[None],
        gt.detach() if batched else gt.detach()[None],
        gt_valid if gt_valid is None or batched else gt_valid[None],
        float(np.float32(pos_iou)),
        float(np.float32(neg_iou)),
        float(np.float32(min_pos_iou)),
        match_low_quality,
    )
    return (matched, max_iou) if batched else (matched[0], max_iou[0])


def _alloc(
    anchors: Tensor,
    gt: Tensor,
    gt_valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    min_pos_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    shape = anchors.shape[:2]
    dtype = _dispatch.compute_dtype(anchors.dtype)
    return anchors.new_empty(shape, dtype=torch.int64), anchors.new_empty(shape, dtype=dtype)


def _launch(
    anchors: Tensor,
    gt: Tensor,
    gt_valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    min_pos_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    matched, max_iou = _alloc(anchors, gt, gt_valid, pos_iou, neg_iou, min_pos_iou, low_quality)
    batch, n, m = *matched.shape, gt.shape[1]
    if m == 0 or matched.numel() == 0:
        return matched.fill_(-1), max_iou.zero_()
    if not anchors[0].is_contiguous():
        anchors = anchors.contiguous()
    gt = gt.contiguous()
    gt_valid = None if gt_valid is None else gt_valid.contiguous()
    top = None
    if low_quality:
        bits = torch.int64 if max_iou.dtype == torch.float64 else torch.int32
        top = gt.new_zeros((batch, m), dtype=bits)
    settings = MATCH.on(anchors)
    _dispatch.launch(
        match_kernel,
        (batch * _dispatch.cdiv(n, settings["BLOCK_N"]),),
        anchors,
        gt,
        gt_valid,
        matched,
        max_iou,
        top,
        n,
        m,
        anchors.stride(0),
        pos_iou,
        neg_iou,
        enable_fp_fusion=False,
        **settings,
    )
    if low_quality:
        settings = LOW_QUALITY.on(anchors)
        _dispatch.launch(
            match_low_quality_kernel,
            (batch * _dispatch.cdiv(n, settings["BLOCK_N"]),),
            anchors,
            gt,
            gt_valid,
            top,
            matched,
            n,
            m,
            anchors.stride(0),
            min_pos_iou,
            enable_fp_fusion=False,
            **settings,
        )
    return matched, max_iou


def _reference(
    anchors: Tensor,
    gt: Tensor,
    gt_valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    min_pos_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    matched, max_iou = _alloc(anchors, gt, gt_valid, pos_iou, neg_iou, min_pos_iou, low_quality)
    for image in range(len(anchors)):
        found = reference.box_match(
            _dispatch.to_numpy(anchors[image]),
            _dispatch.to_numpy(gt[image]),
            pos_iou=pos_iou,
            neg_iou=neg_iou,
            min_pos_iou=min_pos_iou,
            match_low_quality=low_quality,
            gt_valid=None if gt_valid is None else _dispatch.to_numpy(gt_valid[image]),
        )
        for out, values in zip((matched, max_iou), found, strict=True):
            out[image] = _dispatch.from_numpy(values, out.dtype)
    return matched, max_iou


_match = _dispatch.register(
    "box_match(Tensor anchors, Tensor gt, Tensor? gt_valid, float pos_iou, float neg_iou, "
    "float min_pos_iou, bool low_quality) -> (Tensor, Tensor)",
    _launch,
    _reference,
    _alloc,
    vmap=_vmap.merged(3),
)
