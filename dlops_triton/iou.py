"""Pairwise box IoU, GIoU, DIoU and CIoU: the public functions, their autograd and launchers."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from . import _autograd, _checks, _dispatch, _vmap
from ._settings import Settings
from .kernels.iou import box_iou_bwd_kernel, box_iou_fwd_kernel, box_iou_penalty_bwd_kernel
from .reference import iou as reference

PLAIN = ("iou", "iof")  # the kinds without a penalty: the modes of box_iou

# The defaults are chosen for what stays in registers.
FWD = Settings(
    "iou_fwd",
    fp32={"BLOCK_N": 16, "BLOCK_M": 128, "num_warps": 4},
    fp64={"BLOCK_N": 8, "BLOCK_M": 128, "num_warps": 4},
)
# With a penalty, whose hull and angles take twice the registers.
PENALTY_FWD = Settings(
    "iou_penalty_fwd",
    fp32={"BLOCK_N": 16, "BLOCK_M": 64, "num_warps": 4},
    fp64={"BLOCK_N": 8, "BLOCK_M": 64, "num_warps": 4},
)
# The backward splits its sums until there are about so many programs.
BWD = Settings(
    "iou_bwd",
    fp32={"BLOCK_N": 16, "BLOCK_M": 32, "num_warps": 4, "programs": 512},
    fp64={"BLOCK_N": 8, "BLOCK_M": 32, "num_warps": 4, "programs": 512},
)
PENALTY_BWD = Settings(
    "iou_penalty_bwd",
    fp32={"BLOCK_N": 16, "BLOCK_M": 32, "num_warps": 4, "programs": 512},
    fp64={"BLOCK_N": 8, "BLOCK_M": 32, "num_warps": 4, "programs": 512},
)


def box_iou(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    offset: Literal[0, 1] = 0,
    mode: Literal["iou", "iof"] = "iou",
) -> Tensor:
    r"""Intersection over union of every box of one set with every box of another.

    ``torchvision.ops.box_iou`` with a batch dimension, the legacy pixel convention, and a fused
    backward that builds no further [..., N, M].

    Args:
        boxes1: [N, 4] or [..., N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [..., M, 4], the same dtype, device and leading dimensions.
        offset: 1 adds 1 to every width and height (inclusive pixel coordinates).
        mode: "iou", or "iof": over the area of the box of ``boxes1`` instead of the union.

    Returns:
        [..., N, M] in the dtype of the boxes, computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    Where the denominator is 0 (two boxes without area) the IoU is 0. A box with a NaN coordinate
    has IoU NaN with every box; of infinite boxes the value is that of IEEE arithmetic. A pair whose
    IoU is NaN gives neither box a gradient. Equal coordinates share the gradient of min and max in
    halves, as in torch. fp32 values are those of IEEE arithmetic, rounded at each step, the same on
    every GPU; the CPU reference rounds once, from float64. Bitwise deterministic, no host
    synchronisation. Differentiating twice raises.
    """
    _check(boxes1, boxes2, offset)
    _checks.choice("mode", mode, PLAIN)
    return _apply("box_iou", boxes1, boxes2, offset, mode)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, *, offset: Literal[0, 1] = 0) -> Tensor:
    r"""Generalized IoU of every box of one set with every box of another.

    GIoU = IoU - (C - U) / C in [-1, 1], with the area U of the union and C of the smallest box that
    holds both (Rezatofighi et al., CVPR 2019). ``torchvision.ops.generalized_box_iou`` with a batch
    dimension, the legacy pixel convention, and a fused backward.

    Args:
        boxes1: [N, 4] or [..., N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [..., M, 4], the same dtype, device and leading dimensions.
        offset: 1 adds 1 to every width and height (inclusive pixel coordinates), C's included.

    Returns:
        [..., N, M] in the dtype of the boxes, computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    The IoU is that of `box_iou`, 0 for two boxes without area. Where C is 0 there is no penalty. A
    box with a NaN coordinate has NaN with every box; of infinite boxes the value is that of IEEE
    arithmetic. A pair whose value is NaN gives neither box a gradient. Equal coordinates share the
    gradient of min and max in halves, as in torch. Bitwise deterministic, no host synchronisation.
    Differentiating twice raises.
    """
    _check(boxes1, boxes2, offset)
    return _apply("generalized_box_iou", boxes1, boxes2, offset, "giou")


def distance_box_iou(
    boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, offset: Literal[0, 1] = 0
) -> Tensor:
    r"""Distance IoU of every box of one set with every box of another.

    DIoU = IoU - d^2 / (c^2 + eps), with the distance d of the centres and the diagonal c of the
    smallest box that holds both (Zheng et al., AAAI 2020). ``torchvision.ops.distance_box_iou``
    with a batch dimension, the legacy pixel convention, and a fused backward.

    Args:
        boxes1: [N, 4] or [..., N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [..., M, 4], the same dtype, device and leading dimensions.
        eps: added to the squared diagonal; at least 0 and finite. Each value compiles its kernels.
        offset: 1 adds 1 to every width and height (inclusive pixel coordinates), that of the
            smallest box that holds both included.

    Returns:
        [..., N, M] in the dtype of the boxes, computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    Where the squared diagonal and eps are 0 there is no penalty. The rest is as in
    `generalized_box_iou`.
    """
    _check(boxes1, boxes2, offset)
    _checks.number("eps", eps, 0.0, float("inf"), "at least 0 and finite")
    return _apply("distance_box_iou", boxes1, boxes2, offset, "diou", eps)


def complete_box_iou(
    boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, offset: Literal[0, 1] = 0
) -> Tensor:
    r"""Complete IoU of every box of one set with every box of another.

    CIoU = DIoU - alpha v, with v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2 and
    alpha = v / (1 - IoU + v + eps), through which no gradient flows (Zheng et al., AAAI 2020).
    ``torchvision.ops.complete_box_iou`` with a batch dimension, the legacy pixel convention, and a
    fused backward.

    Args:
        boxes1: [N, 4] or [..., N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [..., M, 4], the same dtype, device and leading dimensions.
        eps: added to the squared diagonal and below alpha; at least 0 and finite. Each value
            compiles its kernels.
        offset: 1 adds 1 to every width and height (inclusive pixel coordinates), that of the
            smallest box that holds both included.

    Returns:
        [..., N, M] in the dtype of the boxes, computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    The angle atan(w / h) of a point is 0, without a gradient, where torchvision has NaN; that of a
    box without height is pi/2, whose gradient is the limit's. alpha is 0 where v is. The rest is as
    in `distance_box_iou`.
    """
    _check(boxes1, boxes2, offset)
    _checks.number("eps", eps, 0.0, float("inf"), "at least 0 and finite")
    return _apply("complete_box_iou", boxes1, boxes2, offset, "ciou", eps)


def _check(boxes1: Tensor, boxes2: Tensor, offset: int) -> None:
    _checks.boxes("boxes1", boxes1, batched=True)
    _checks.boxes("boxes2", boxes2, batched=True)
    _checks.same_device("boxes2", boxes2, "boxes1", boxes1)
    if boxes1.dtype != boxes2.dtype:
        raise TypeError(f"boxes2 must have the dtype of boxes1, {boxes1.dtype}, got {boxes2.dtype}")
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        raise ValueError(
            f"boxes1 and boxes2 must have the same leading dimensions, got shapes "
            f"{tuple(boxes1.shape)} and {tuple(boxes2.shape)}"
        )
    _checks.choice("offset", offset, (0, 1))


def _apply(
    name: str, boxes1: Tensor, boxes2: Tensor, offset: int, kind: str, eps: float = 0.0
) -> Tensor:
    value: Tensor = _BoxIou.apply(name, boxes1, boxes2, int(offset), kind, float(eps))
    return value


class _BoxIou(_autograd.Function):
    @staticmethod
    def keep(ctx: Any, op: str, boxes1: Tensor, boxes2: Tensor, *options: Any) -> None:
        ctx.save_for_backward(boxes1, boxes2)
        ctx.op, ctx.options = op, options

    @staticmethod
    def forward(ctx: Any, op: str, boxes1: Tensor, boxes2: Tensor, *options: Any) -> Tensor:
        _BoxIou.keep(ctx, op, boxes1, boxes2, *options)
        return _fwd(boxes1, boxes2, *options)

    @staticmethod
    @_autograd.once_differentiable()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes1, boxes2 = ctx.saved_tensors
        d1 = d2 = None
        if ctx.needs_input_grad[1]:
            d1 = _bwd(grad, boxes1, boxes2, *ctx.options, True)
        if ctx.needs_input_grad[2]:
            d2 = _bwd(grad.mT, boxes2, boxes1, *ctx.options, False)
        return None, d1, d2, None, None, None


def _alloc_iou(boxes1: Tensor, boxes2: Tensor, offset: int, kind: str, eps: float) -> Tensor:
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.shape[-2]))


def _alloc_grad(
    grad: Tensor,
    own: Tensor,
    other: Tensor,
    offset: int,
    kind: str,
    eps: float,
    own_is_first: bool,
) -> Tensor:
    return own.new_empty(own.shape)


def _launch_fwd(boxes1: Tensor, boxes2: Tensor, offset: int, kind: str, eps: float) -> Tensor:
    out = _alloc_iou(boxes1, boxes2, offset, kind, eps)
    if out.numel() == 0:
        return out
    n, m = out.shape[-2:]
    settings = (FWD if kind in PLAIN else PENALTY_FWD).on(boxes1)
    tiles = _dispatch.cdiv(n, settings["BLOCK_N"]) * _dispatch.cdiv(m, settings["BLOCK_M"])
    _dispatch.launch(
        box_iou_fwd_kernel,
        (out.numel() // (n * m) * tiles,),
        boxes1.contiguous(),
        boxes2.contiguous(),
        out,
        n,
        m,
        OFFSET=offset,
        KIND=kind,
        EPS=eps,
        enable_fp_fusion=False,
        **settings,
    )
    return out


def _launch_bwd(
    grad: Tensor,
    own: Tensor,
    other: Tensor,
    offset: int,
    kind: str,
    eps: float,
    own_is_first: bool,
) -> Tensor:
    n, m = grad.shape[-2:]
    if grad.numel() == 0:
        return _alloc_grad(grad, own, other, offset, kind, eps, own_is_first).zero_()
    settings = dict((BWD if kind in PLAIN else PENALTY_BWD).on(own))
    wanted = settings.pop("programs")
    grad = grad.reshape(-1, n, m)
    programs = grad.shape[0] * _dispatch.cdiv(n, settings["BLOCK_N"])
    blocks = _dispatch.cdiv(m, settings["BLOCK_M"])
    per_split = _dispatch.cdiv(blocks, min(blocks, _dispatch.cdiv(wanted, programs)))
    splits = _dispatch.cdiv(blocks, per_split)
    dtype = _dispatch.compute_dtype(own.dtype)
    partial = own.new_empty((splits, *own.shape), dtype=dtype)
    kernel, options = box_iou_penalty_bwd_kernel, {"KIND": kind, "EPS": eps}
    if kind in PLAIN:
        kernel, options = box_iou_bwd_kernel, {"IOF": kind == "iof", "OWN_IS_FIRST": own_is_first}
    _dispatch.launch(
        kernel,
        (programs, splits),
        own.contiguous(),
        other.contiguous(),
        grad,
        partial,
        n,
        m,
        per_split * settings["BLOCK_M"],
        *grad.stride(),
        OFFSET=offset,
        **options,
        enable_fp_fusion=True,
        **settings,
    )
    return (partial[0] if splits == 1 else partial.sum(0)).to(own.dtype)


def _reference_fwd(boxes1: Tensor, boxes2: Tensor, offset: int, kind: str, eps: float) -> Tensor:
    a, b = _dispatch.to_numpy(boxes1), _dispatch.to_numpy(boxes2)
    if kind in PLAIN:
        value = reference.box_iou(a, b, offset=offset, mode=kind)
    else:
        value = reference.box_penalized(a, b, kind, offset=offset, eps=eps)
    return _dispatch.from_numpy(value, boxes1.dtype)


def _reference_bwd(
    grad: Tensor,
    own: Tensor,
    other: Tensor,
    offset: int,
    kind: str,
    eps: float,
    own_is_first: bool,
) -> Tensor:
    g, a, b = (_dispatch.to_numpy(t) for t in (grad, own, other))
    if kind not in PLAIN:
        d, _ = reference.box_penalized_grad(a, b, g, kind, offset=offset, eps=eps)
    elif own_is_first:
        d, _ = reference.box_iou_grad(a, b, g, offset=offset, mode=kind)
    else:
        _, d = reference.box_iou_grad(b, a, g.swapaxes(-1, -2), offset=offset, mode=kind)
    return _dispatch.from_numpy(d, own.dtype)


_fwd = _dispatch.register(
    "box_iou_fwd(Tensor boxes1, Tensor boxes2, int offset, str kind, float eps) -> Tensor",
    _launch_fwd,
    _reference_fwd,
    _alloc_iou,
    vmap=_vmap.leading(2),
)
_bwd = _dispatch.register(
    "box_iou_bwd(Tensor grad, Tensor own, Tensor other, int offset, str kind, float eps, "
    "bool own_is_first) -> Tensor",
    _launch_bwd,
    _reference_bwd,
    _alloc_grad,
    vmap=_vmap.leading(3),
)
