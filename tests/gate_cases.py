"""Calls whose launches the compile gate compiles: real shapes, every kernel's variants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from dlops_triton import (
    _dispatch,
    box_iou,
    box_match,
    complete_box_iou,
    complete_box_iou_loss,
    deform_conv2d,
    deform_sample,
    distance_box_iou,
    distance_box_iou_loss,
    generalized_box_iou,
    generalized_box_iou_loss,
    ghmc_loss,
    ghmr_loss,
    nms_padded,
    sigmoid_focal_loss,
    soft_nms_padded,
    softmax_focal_loss,
)

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
ANCHORS, CLASSES = 2000, 80


def _focal(
    dtype: torch.dtype, form: str, reduction: str, weight: str = "", **options: float
) -> None:
    x = torch.zeros(ANCHORS, CLASSES, dtype=dtype, requires_grad=True)
    targets: dict[str, Tensor] = {
        "labels": torch.zeros(ANCHORS, dtype=torch.int64),
        "soft": torch.zeros(ANCHORS, CLASSES),
        "bool": torch.zeros(ANCHORS, CLASSES, dtype=torch.bool),
    }
    weights = {"": None, "row": torch.ones(ANCHORS), "element": torch.ones(ANCHORS, CLASSES)}
    loss = sigmoid_focal_loss(
        x,
        targets[form],
        reduction=reduction,  # type: ignore[arg-type]
        weight=weights[weight],
        **options,  # type: ignore[arg-type]
    )
    # A strided gradient for "none", as a chain of further operations gives it.
    loss.backward(torch.ones_like(loss))


def _focal_sum(
    dtype: torch.dtype, gradient: bool = True, columns: bool = False, portable: bool = False
) -> None:
    """Reduced labels; ``columns`` as a permuted head has them, ``portable`` without inline PTX."""
    x = torch.zeros((CLASSES, ANCHORS) if columns else (ANCHORS, CLASSES), dtype=dtype)
    x = (x.mT if columns else x).requires_grad_(gradient)
    ptx = _dispatch.inline_ptx
    with mock.patch.object(_dispatch, "inline_ptx", lambda d: not portable and ptx(d)):
        loss = sigmoid_focal_loss(x, torch.zeros(ANCHORS, dtype=torch.int64), reduction="sum")
    if gradient:
        loss.backward()


def _softmax_focal(
    dtype: torch.dtype, shape: tuple[int, ...], reduction: str = "sum", **options: object
) -> None:
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    labels = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    loss = softmax_focal_loss(x, labels, reduction=reduction, **options)  # type: ignore[arg-type]
    loss.backward(torch.ones_like(loss))


def _ghmc(
    dtype: torch.dtype,
    bins: int,
    weighted: bool = False,
    momentum: float = 0.0,
    soft: bool = False,
    reduction: str = "mean",
) -> None:
    x = torch.zeros(ANCHORS, CLASSES, dtype=dtype, requires_grad=True)
    target = torch.zeros(ANCHORS, CLASSES) if soft else torch.zeros(ANCHORS, dtype=torch.int64)
    loss = ghmc_loss(
        x,
        target,
        torch.ones(ANCHORS) if weighted else None,
        bins=bins,
        momentum=momentum,
        acc_sum=torch.zeros(bins) if momentum else None,
        reduction=reduction,  # type: ignore[arg-type]
    )
    loss.backward(torch.ones_like(loss))


def _ghmr(dtype: torch.dtype, momentum: float = 0.0) -> None:
    x = torch.zeros(ANCHORS, 4, dtype=dtype, requires_grad=True)
    acc_sum = torch.zeros(10) if momentum else None
    target, weight = torch.zeros(ANCHORS, 4), torch.ones(ANCHORS, 4)
    ghmr_loss(x, target, weight, momentum=momentum, acc_sum=acc_sum).backward()


def _iou(dtype: torch.dtype, op: Callable[..., Tensor] = box_iou, **options: object) -> None:
    a = torch.zeros(2, 1000, 4, dtype=dtype, requires_grad=True)
    b = torch.zeros(2, 300, 4, dtype=dtype, requires_grad=True)
    iou = op(a, b, **options)
    iou.backward(torch.ones_like(iou))


def _iou_loss(
    dtype: torch.dtype,
    op: Callable[..., Tensor],
    reduction: str = "none",
    both: bool = False,
    pairs: int = ANCHORS,
) -> None:
    a, b = (torch.zeros(pairs, 4, dtype=dtype, requires_grad=x) for x in (True, both))
    op(a, b, reduction).sum().backward()


def _nms(
    dtype: torch.dtype, tier: str, ids: torch.dtype | None = None, **options: float | int
) -> None:
    n = {"small": 1000, "segments": 5000, "bands": 30_000}[tier]  # more than one band
    boxes, scores = torch.zeros(2, n, 4, dtype=dtype), torch.zeros(2, n, dtype=dtype)
    idxs = None if ids is None else torch.zeros(2, n, dtype=ids)
    nms_padded(
        boxes,
        scores,
        0.5,
        idxs=idxs,
        max_output=1025 if tier == "bands" else 100,
        **options,  # type: ignore[arg-type]
    )


def _soft_nms(
    dtype: torch.dtype, n: int, method: str, ids: torch.dtype | None = None, offset: int = 0
) -> None:
    soft_nms_padded(
        torch.zeros(2, n, 4, dtype=dtype),
        torch.ones(2, n, dtype=dtype),
        method=method,  # type: ignore[arg-type]
        idxs=None if ids is None else torch.zeros(2, n, dtype=ids),
        offset=offset,  # type: ignore[arg-type]
        max_output=100,
    )


def _match(dtype: torch.dtype, padded: bool = False, low_quality: bool = True) -> None:
    """``padded`` as a training loop has them: boxes to a common number, anchors of all images."""
    anchors, gt = torch.zeros(2, ANCHORS, 4, dtype=dtype), torch.zeros(2, 300, 4, dtype=dtype)
    valid = torch.ones(2, 300, dtype=torch.bool) if padded else None
    anchors = anchors[0] if padded else anchors
    box_match(anchors, gt, gt_valid=valid, match_low_quality=low_quality)


def _deform_conv(
    dtype: torch.dtype,
    implementation: str = "fused",
    channels: int = 256,
    groups: int = 1,
    needs: str = "x offset mask weight",
    tf32: bool = False,
    in_order: bool = False,
) -> None:
    """A 3 x 3 convolution in channels-last format, of ``needs`` as many gradients."""

    def tensor(name: str, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_(name in needs.split())

    taps = 9 * groups
    x = torch.zeros(2, 12, 12, channels, dtype=dtype).permute(0, 3, 1, 2)
    x.requires_grad_("x" in needs.split())
    torch.backends.cuda.matmul.allow_tf32 = tf32
    out = deform_conv2d(
        x,
        tensor("offset", 2, 2 * taps, 12, 12),
        tensor("weight", channels, channels // groups, 3, 3),
        padding=1,
        mask=tensor("mask", 2, taps, 12, 12),
        _implementation=implementation,  # type: ignore[arg-type]
    )
    torch.use_deterministic_algorithms(in_order)
    if needs:
        out.backward(torch.ones_like(out))
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = False


def _deform_sample(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 64, 12, 12, dtype=dtype, requires_grad=True)
    offset = torch.zeros(2, 18, 12, 12, requires_grad=True)
    columns = deform_sample(x, offset, 3, padding=1)
    columns.backward(torch.ones_like(columns))


_CALLS: dict[str, Callable[[], None]] = {
    **{
        f"focal {str(dtype).removeprefix('torch.')} labels sum": functools.partial(
            _focal, dtype, "labels", "sum"
        )
        for dtype in (HALF, BFLOAT, FLOAT, DOUBLE)
    },
    "focal bfloat16 labels sum no gradient": functools.partial(_focal_sum, BFLOAT, False),
    "focal bfloat16 columns sum": functools.partial(_focal_sum, BFLOAT, columns=True),
    "focal bfloat16 labels sum portable": functools.partial(_focal_sum, BFLOAT, portable=True),
    "focal bfloat16 labels sum no gradient portable": functools.partial(
        _focal_sum, BFLOAT, False, portable=True
    ),
    "focal bfloat16 labels none": functools.partial(_focal, BFLOAT, "labels", "none"),
    "focal float32 soft none": functools.partial(_focal, FLOAT, "soft", "none"),
    "focal bfloat16 bool weighted gamma 0.5": functools.partial(
        _focal, BFLOAT, "bool", "mean", "element", gamma=0.5, alpha=-1, label_smoothing=0.1
    ),
    "focal float64 soft weighted none": functools.partial(
        _focal, DOUBLE, "soft", "none", "element", gamma=0.5, label_smoothing=0.1
    ),
    "focal float32 labels weighted gamma 0": functools.partial(
        _focal, FLOAT, "labels", "mean", "row", gamma=0.0
    ),
    "softmax_focal bfloat16": functools.partial(_softmax_focal, BFLOAT, (ANCHORS, CLASSES)),
    "softmax_focal bfloat16 none": functools.partial(
        _softmax_focal, BFLOAT, (ANCHORS, CLASSES), "none"
    ),
    "softmax_focal float32 weighted, smoothed": functools.partial(
        *(_softmax_focal, FLOAT, (ANCHORS, CLASSES), "mean"),
        weight=torch.ones(CLASSES),
        label_smoothing=0.1,
        gamma=0.5,
    ),
    "softmax_focal float64": functools.partial(_softmax_focal, DOUBLE, (ANCHORS, CLASSES)),
    "softmax_focal bfloat16 images": functools.partial(_softmax_focal, BFLOAT, (2, 19, 64, 64)),
    "softmax_focal bfloat16 long": functools.partial(_softmax_focal, BFLOAT, (16, 50_000)),
    "softmax_focal float32 long images": functools.partial(_softmax_focal, FLOAT, (2, 608, 32, 32)),
    "ghmc bfloat16 10 bins": functools.partial(_ghmc, BFLOAT, 10),
    "ghmc bfloat16 30 bins, momentum": functools.partial(_ghmc, BFLOAT, 30, True, 0.75),
    "ghmc float32 soft": functools.partial(_ghmc, FLOAT, 10, True, soft=True),
    "ghmc bfloat16 soft": functools.partial(_ghmc, BFLOAT, 10, soft=True),
    "ghmc float32 none": functools.partial(_ghmc, FLOAT, 10, reduction="none"),
    "ghmc float64": functools.partial(_ghmc, DOUBLE, 10),
    "ghmr float32": functools.partial(_ghmr, FLOAT),
    "ghmr float64 momentum": functools.partial(_ghmr, DOUBLE, 0.7),
    **{
        f"iou {str(dtype).removeprefix('torch.')}": functools.partial(_iou, dtype)
        for dtype in (BFLOAT, FLOAT, DOUBLE)
    },
    "iof float32 offset 1": functools.partial(_iou, FLOAT, mode="iof", offset=1),
    "giou float32": functools.partial(_iou, FLOAT, generalized_box_iou),
    "giou bfloat16 offset 1": functools.partial(_iou, BFLOAT, generalized_box_iou, offset=1),
    "diou float32": functools.partial(_iou, FLOAT, distance_box_iou),
    "ciou float32": functools.partial(_iou, FLOAT, complete_box_iou),
    "ciou float16": functools.partial(_iou, HALF, complete_box_iou),
    "ciou float64": functools.partial(_iou, DOUBLE, complete_box_iou),
    "giou_loss float32 sum": functools.partial(_iou_loss, FLOAT, generalized_box_iou_loss, "sum"),
    "giou_loss float32 mean of one": functools.partial(
        _iou_loss, FLOAT, generalized_box_iou_loss, "mean", pairs=1
    ),
    "giou_loss bfloat16": functools.partial(_iou_loss, BFLOAT, generalized_box_iou_loss),
    "diou_loss float32 both": functools.partial(_iou_loss, FLOAT, distance_box_iou_loss, both=True),
    "ciou_loss float32 mean": functools.partial(_iou_loss, FLOAT, complete_box_iou_loss, "mean"),
    "ciou_loss float16 both": functools.partial(_iou_loss, HALF, complete_box_iou_loss, both=True),
    "ciou_loss float64 mean both": functools.partial(
        _iou_loss, DOUBLE, complete_box_iou_loss, "mean", True
    ),
    **{
        f"match {str(dtype).removeprefix('torch.')}": functools.partial(_match, dtype)
        for dtype in (HALF, BFLOAT, FLOAT, DOUBLE)
    },
    "match float32 padded": functools.partial(_match, FLOAT, True),
    "match float32 thresholds alone": functools.partial(_match, FLOAT, low_quality=False),
    **{
        f"nms {tier} float32": functools.partial(_nms, FLOAT, tier)
        for tier in ("small", "segments", "bands")
    },
    "deform_conv bfloat16": functools.partial(_deform_conv, BFLOAT),
    "deform_conv float16 odd": functools.partial(
        _deform_conv, HALF, channels=40, groups=2, needs=""
    ),
    "deform_conv float32 tf32": functools.partial(_deform_conv, FLOAT, needs="", tf32=True),
    "deform_conv float64": functools.partial(_deform_conv, DOUBLE, channels=32),
    "deform_conv float32 in order": functools.partial(
        _deform_conv, FLOAT, "columns", channels=64, needs="x", in_order=True
    ),
    "deform_sample bfloat16": functools.partial(_deform_sample, BFLOAT),
    "nms small classes float16 offset 1": functools.partial(
        *(_nms, HALF, "small", torch.int64), offset=1, score_threshold=0.1
    ),
    "nms segments classes bfloat16": functools.partial(
        *(_nms, BFLOAT, "segments", torch.int32), score_threshold=0.1
    ),
    "nms segments classes float32": functools.partial(_nms, FLOAT, "segments", torch.int64),
    "nms bands float16 offset 1": functools.partial(_nms, HALF, "bands", offset=1),
    "nms segments float64": functools.partial(_nms, DOUBLE, "segments"),
    "nms bands float64": functools.partial(_nms, DOUBLE, "bands"),
    "soft_nms float32 1024": functools.partial(_soft_nms, FLOAT, 1000, "gaussian"),
    "soft_nms float32 5000": functools.partial(_soft_nms, FLOAT, 5000, "gaussian"),
    "soft_nms float32 linear classes": functools.partial(
        _soft_nms, FLOAT, 5000, "linear", torch.int64
    ),
    "soft_nms bfloat16 hard offset 1": functools.partial(
        _soft_nms, BFLOAT, 1000, "hard", torch.int32, offset=1
    ),
    "soft_nms float64": functools.partial(_soft_nms, DOUBLE, 1000, "gaussian"),
}

CASES = list(_CALLS.items())
