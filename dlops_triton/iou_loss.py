"""GIoU, DIoU and CIoU losses: the public functions, their autograd and their launchers."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from . import _autograd, _checks, _dispatch, _vmap
from ._settings import Settings
from .kernels.iou_loss import iou_loss_bwd_kernel, iou_loss_fwd_kernel
from .reference import iou_loss as reference

FWD = Settings("iou_loss_fwd", fp32={"BLOCK": 256, "num_warps": 4})
BWD = Settings("iou_loss_bwd", fp32={"BLOCK": 128, "num_warps": 4})

Reduction = Literal["none", "mean", "sum"]


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: Reduction = "none", eps: float = 1e-7
) -> Tensor:
    r"""Generalized IoU loss of pairs of boxes, ``torchvision.ops.generalized_box_iou_loss``.

    L = 1 - I / (U + eps) + (C - U) / (C + eps), with the areas I of the intersection, U of the
    union and C of the smallest box that holds both (Rezatofighi et al., CVPR 2019).

    Args:
        boxes1: [..., 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: the same shape, dtype and device.
        reduction: "none", "mean" (over all pairs; 0 of none) or "sum".
        eps: at least 0 and finite; a quotient whose denominator is 0 is 0. Each value compiles its
            kernels.

    Returns:
        "none": [...] in the dtype of the boxes. "mean", "sum": a scalar, fp32 (fp64 for fp64
        boxes). Computed in fp32 (fp64 for fp64). Of DTensors sharded by pairs it is one, sharded
        alike or a partial sum.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    A pair with a NaN coordinate has loss NaN; of infinite boxes the loss is that of IEEE
    arithmetic, mostly NaN. A pair whose loss is NaN gets no gradient and spoils no other's. Boxes
    that only touch pass no gradient through I; equal coordinates share that of min and max in
    halves, as in torch. Boxes inside out are taken as they are, areas and all. Sums are added in a
    fixed order: bitwise deterministic. One launch forward, one backward, no host synchronisation.
    Differentiating twice raises.
    """
    return _apply("generalized_box_iou_loss", boxes1, boxes2, "giou", reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: Reduction = "none", eps: float = 1e-7
) -> Tensor:
    r"""Distance IoU loss of pairs of boxes, ``torchvision.ops.distance_box_iou_loss``.

    L = 1 - I / (U + eps) + d^2 / (c^2 + eps), with the areas I of the intersection and U of the
    union, the distance d of the centres and the diagonal c of the smallest box that holds both
    (Zheng et al., AAAI 2020).

    Args:
        boxes1: [..., 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: the same shape, dtype and device.
        reduction: "none", "mean" (over all pairs; 0 of none) or "sum".
        eps: at least 0 and finite; a quotient whose denominator is 0 is 0. Each value compiles its
            kernels.

    Returns:
        "none": [...] in the dtype of the boxes. "mean", "sum": a scalar, fp32 (fp64 for fp64
        boxes). Computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    Bad boxes, gradients and determinism are as in `generalized_box_iou_loss`.
    """
    return _apply("distance_box_iou_loss", boxes1, boxes2, "diou", reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: Reduction = "none", eps: float = 1e-7
) -> Tensor:
    r"""Complete IoU loss of pairs of boxes, ``torchvision.ops.complete_box_iou_loss``.

    The distance IoU loss + alpha v, with v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2 and
    alpha = v / (1 - IoU + v + eps), through which no gradient flows (Zheng et al., AAAI 2020).

    Args:
        boxes1: [..., 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: the same shape, dtype and device.
        reduction: "none", "mean" (over all pairs; 0 of none) or "sum".
        eps: in all three quotients; at least 0 and finite; a quotient whose denominator is 0 is 0.
            Each value compiles its kernels.

    Returns:
        "none": [...] in the dtype of the boxes. "mean", "sum": a scalar, fp32 (fp64 for fp64
        boxes). Computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    The angle atan(w / h) of a point is 0, without a gradient, where torchvision has NaN; that of a
    box without height is pi/2, whose gradient is the limit's. The rest is as in
    `generalized_box_iou_loss`.
    """
    return _apply("complete_box_iou_loss", boxes1, boxes2, "ciou", reduction, eps)


def _apply(
    op: str, boxes1: Tensor, boxes2: Tensor, kind: str, reduction: str, eps: float
) -> Tensor:
    if _checks.distributed(boxes1):
        return _sharded(op, boxes1, boxes2, kind, reduction, eps)
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        _checks.tensor(name, boxes)
        if boxes.dim() == 0 or boxes.shape[-1] != 4:
            raise ValueError(f"{name} must have shape [..., 4] (xyxy), got {tuple(boxes.shape)}")
        _checks.dtype(name, boxes)
    _checks.same_device("boxes2", boxes2, "boxes1", boxes1)
    if boxes1.dtype != boxes2.dtype:
        raise TypeError(f"boxes2 must have the dtype of boxes1, {boxes1.dtype}, got {boxes2.dtype}")
    if boxes1.shape != boxes2.shape:
        raise ValueError(
            f"boxes2 must have the shape of boxes1, {tuple(boxes1.shape)}, got "
            f"{tuple(boxes2.shape)}"
        )
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.number("eps", eps, 0.0, float("inf"), "at least 0 and finite")
    loss: Tensor = _IouLoss.apply(op, boxes1, boxes2, kind, reduction, float(eps))
    return loss


def _sharded(op: str, boxes1: Any, boxes2: Any, kind: str, reduction: str, eps: float) -> Any:
    """The loss of DTensors, pair by pair."""
    from . import _distributed

    rows = _distributed.Rows("boxes1", boxes1, -1)
    pairs = rows.local("boxes1", boxes1), rows.local("boxes2", boxes2)
    if reduction == "mean":
        loss = _apply(op, *pairs, kind, "sum", eps) / max(boxes1.numel() // 4, 1)
    else:
        loss = _apply(op, *pairs, kind, reduction, eps)
    return rows.loss(loss, boxes1.shape[:-1] if reduction == "none" else None)


class _IouLoss(_autograd.Function):
    @staticmethod
    def keep(ctx: Any, op: str, boxes1: Tensor, boxes2: Tensor, *options: Any) -> None:
        ctx.save_for_backward(boxes1, boxes2)
        ctx.op, ctx.options = op, options

    @staticmethod
    def forward(ctx: Any, op: str, boxes1: Tensor, boxes2: Tensor, *options: Any) -> Tensor:
        _IouLoss.keep(ctx, op, boxes1, boxes2, *options)
        return _fwd(boxes1, boxes2, *options)

    @staticmethod
    @_autograd.once_differentiable()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, *needs, _, _, _ = ctx.needs_input_grad
        found = iter(_bwd(grad, *ctx.saved_tensors, *ctx.options, *needs))
        d1, d2 = (next(found) if need else None for need in needs)
        return None, d1, d2, None, None, None


def _alloc_loss(boxes1: Tensor, boxes2: Tensor, kind: str, reduction: str, eps: float) -> Tensor:
    if reduction == "none":
        return boxes1.new_empty(boxes1.shape[:-1])
    return boxes1.new_empty((), dtype=_dispatch.compute_dtype(boxes1.dtype))


def _alloc_grads(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str,
    reduction: str,
    eps: float,
    first: bool,
    second: bool,
) -> list[Tensor]:
    return [boxes1.new_empty(boxes1.shape) for needed in (first, second) if needed]


def _launch_fwd(boxes1: Tensor, boxes2: Tensor, kind: str, reduction: str, eps: float) -> Tensor:
    loss = _alloc_loss(boxes1, boxes2, kind, reduction, eps)
    n = boxes1.numel() // 4
    if n == 0:
        return loss.zero_()
    settings = FWD.on(boxes1)
    programs = _dispatch.cdiv(n, settings["BLOCK"])
    reduces = reduction != "none"
    out = loss.new_empty(1 + programs) if reduces else loss
    _dispatch.launch(
        iou_loss_fwd_kernel,
        (programs,),
        boxes1.contiguous(),
        boxes2.contiguous(),
        out,
        _dispatch.counter(boxes1.device) if reduces else None,
        n,
        KIND=kind,
        EPS=eps,
        REDUCTION=reduction,
        enable_fp_fusion=False,
        **settings,
    )
    return out[0] if reduces else loss


def _launch_bwd(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str,
    reduction: str,
    eps: float,
    first: bool,
    second: bool,
) -> list[Tensor]:
    gradients = _alloc_grads(grad, boxes1, boxes2, kind, reduction, eps, first, second)
    n = boxes1.numel() // 4
    if n == 0:
        return gradients
    settings = BWD.on(boxes1)
    grad = grad.reshape(-1)
    _dispatch.launch(
        iou_loss_bwd_kernel,
        (_dispatch.cdiv(n, settings["BLOCK"]),),
        grad,
        boxes1.contiguous(),
        boxes2.contiguous(),
        gradients[0] if first else None,
        gradients[-1] if second else None,
        n,
        grad.stride(0),
        KIND=kind,
        EPS=eps,
        REDUCTION=reduction,
        enable_fp_fusion=True,
        **settings,
    )
    return gradients


def _reference_fwd(boxes1: Tensor, boxes2: Tensor, kind: str, reduction: str, eps: float) -> Tensor:
    loss = reference.iou_loss(_dispatch.to_numpy(boxes1), _dispatch.to_numpy(boxes2), kind, eps=eps)
    if reduction != "none":
        total = loss.sum() / (max(loss.size, 1) if reduction == "mean" else 1)
        return _dispatch.from_numpy(total, _dispatch.compute_dtype(boxes1.dtype))
    return _dispatch.from_numpy(loss, boxes1.dtype)


def _reference_bwd(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str,
    reduction: str,
    eps: float,
    first: bool,
    second: bool,
) -> list[Tensor]:
    g, a, b = (_dispatch.to_numpy(t) for t in (grad, boxes1, boxes2))
    if reduction == "mean":
        g = g.astype("float64") / max(a.size // 4, 1)
    both = reference.iou_loss_grad(a, b, g, kind, eps=eps)
    return [
        _dispatch.from_numpy(d, boxes1.dtype)
        for d, needed in zip(both, (first, second), strict=True)
        if needed
    ]


def _not_reduced(_: Any, kind: str, reduction: str, *others: Any) -> bool:
    return reduction == "none"


_fwd = _dispatch.register(
    "iou_loss_fwd(Tensor boxes1, Tensor boxes2, str kind, str reduction, float eps) -> Tensor",
    _launch_fwd,
    _reference_fwd,
    _alloc_loss,
    vmap=_vmap.leading(2, _not_reduced),
)
_bwd = _dispatch.register(
    "iou_loss_bwd(Tensor grad, Tensor boxes1, Tensor boxes2, str kind, str reduction, float eps, "
    "bool first, bool second) -> Tensor[]",
    _launch_bwd,
    _reference_bwd,
    _alloc_grads,
    vmap=_vmap.leading(3, _not_reduced),
)
