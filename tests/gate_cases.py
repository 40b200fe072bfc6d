"""Calls whose launches the compile gate compiles: real shapes, every kernel's variants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from dlops_triton import _dispatch, batched_nms, box_iou, nms, sigmoid_focal_loss

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


def _iou(dtype: torch.dtype, **options: object) -> None:
    a = torch.zeros(2, 1000, 4, dtype=dtype, requires_grad=True)
    b = torch.zeros(2, 300, 4, dtype=dtype, requires_grad=True)
    iou = box_iou(a, b, **options)  # type: ignore[arg-type]
    iou.backward(torch.ones_like(iou))


def _nms(dtype: torch.dtype, ids: torch.dtype | None, **options: int) -> None:
    n = 20_000  # more than a band
    boxes, scores = torch.zeros(n, 4, dtype=dtype), torch.zeros(n, dtype=dtype)
    if ids is None:
        nms(boxes, scores, 0.5, **options)  # type: ignore[arg-type]
    else:
        batched_nms(boxes, scores, torch.zeros(n, dtype=ids), 0.5, **options)  # type: ignore[arg-type]


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
    **{
        f"iou {str(dtype).removeprefix('torch.')}": functools.partial(_iou, dtype)
        for dtype in (BFLOAT, FLOAT, DOUBLE)
    },
    "iof float32 offset 1": functools.partial(_iou, FLOAT, mode="iof", offset=1),
    "nms float32": functools.partial(_nms, FLOAT, None),
    "nms float16 offset 1": functools.partial(_nms, HALF, None, offset=1),
    "nms float64": functools.partial(_nms, DOUBLE, None),
    "batched_nms float32 int64": functools.partial(_nms, FLOAT, torch.int64),
    "batched_nms bfloat16 int32": functools.partial(_nms, BFLOAT, torch.int32),
}

CASES = list(_CALLS.items())
