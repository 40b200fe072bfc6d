"""Pairwise box IoU: the public function, its autograd and its launchers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
from torch import Tensor

from . import _autograd, _checks, _dispatch
from ._settings import Settings
from .kernels.iou import box_iou_bwd_kernel, box_iou_fwd_kernel
from .reference import iou as reference

# The defaults are chosen for what stays in registers.
FWD = Settings(
    "iou_fwd",
    fp32={"BLOCK_N": 16, "BLOCK_M": 128, "num_warps": 4},
    fp64={"BLOCK_N": 8, "BLOCK_M": 128, "num_warps": 4},
)
# The backward splits its sums until there are about so many programs.
BWD = Settings(
    "iou_bwd",
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
    _checks.choice("mode", mode, ("iou", "iof"))
    iou: Tensor = _BoxIou.apply(  # type: ignore[no-untyped-call]
        boxes1, boxes2, int(offset), mode == "iof"
    )
    return iou


class _BoxIou(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, boxes1: Tensor, boxes2: Tensor, offset: int, iof: bool) -> Tensor:
        ctx.save_for_backward(boxes1, boxes2)
        ctx.options = (offset, iof)
        return _fwd(boxes1, boxes2, offset, iof)

    @staticmethod
    @_autograd.once_differentiable("box_iou")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes1, boxes2 = ctx.saved_tensors
        d1 = d2 = None
        if ctx.needs_input_grad[0]:
            d1 = _bwd(grad, boxes1, boxes2, *ctx.options, True)
        if ctx.needs_input_grad[1]:
            d2 = _bwd(grad.mT, boxes2, boxes1, *ctx.options, False)
        return d1, d2, None, None


def _alloc_iou(boxes1: Tensor, boxes2: Tensor, offset: int, iof: bool) -> Tensor:
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.shape[-2]))


def _alloc_grad(
    grad: Tensor, own: Tensor, other: Tensor, offset: int, iof: bool, own_is_first: bool
) -> Tensor:
    return own.new_empty(own.shape)


def _launch_fwd(boxes1: Tensor, boxes2: Tensor, offset: int, iof: bool) -> Tensor:
    iou = _alloc_iou(boxes1, boxes2, offset, iof)
    if iou.numel() == 0:
        return iou
    n, m = iou.shape[-2:]
    settings = FWD.on(boxes1)
    tiles = triton.cdiv(n, settings["BLOCK_N"]) * triton.cdiv(m, settings["BLOCK_M"])
    _dispatch.launch(
        box_iou_fwd_kernel,
        (iou.numel() // (n * m) * tiles,),
        boxes1.contiguous(),
        boxes2.contiguous(),
        iou,
        n,
        m,
        OFFSET=offset,
        IOF=iof,
        enable_fp_fusion=False,
        **settings,
    )
    return iou


def _launch_bwd(
    grad: Tensor, own: Tensor, other: Tensor, offset: int, iof: bool, own_is_first: bool
) -> Tensor:
    n, m = grad.shape[-2:]
    if grad.numel() == 0:
        return _alloc_grad(grad, own, other, offset, iof, own_is_first).zero_()
    settings = dict(BWD.on(own))
    wanted = settings.pop("programs")
    grad = grad.reshape(-1, n, m)
    programs = grad.shape[0] * triton.cdiv(n, settings["BLOCK_N"])
    blocks = triton.cdiv(m, settings["BLOCK_M"])
    per_split = triton.cdiv(blocks, min(blocks, triton.cdiv(wanted, programs)))
    splits = triton.cdiv(blocks, per_split)
    dtype = _dispatch.compute_dtype(own.dtype)
    partial = own.new_empty((splits, *own.shape), dtype=dtype)
    _dispatch.launch(
        box_iou_bwd_kernel,
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
        IOF=iof,
        OWN_IS_FIRST=own_is_first,
        enable_fp_fusion=True,
        **settings,
    )
    return (partial[0] if splits == 1 else partial.sum(0)).to(own.dtype)


def _mode(iof: bool) -> str:
    return "iof" if iof else "iou"


def _reference_fwd(boxes1: Tensor, boxes2: Tensor, offset: int, iof: bool) -> Tensor:
    a, b = _dispatch.to_numpy(boxes1), _dispatch.to_numpy(boxes2)
    return _dispatch.from_numpy(
        reference.box_iou(a, b, offset=offset, mode=_mode(iof)), boxes1.dtype
    )


def _reference_bwd(
    grad: Tensor, own: Tensor, other: Tensor, offset: int, iof: bool, own_is_first: bool
) -> Tensor:
    g, a, b = (_dispatch.to_numpy(t) for t in (grad, own, other))
    if own_is_first:
        d, _ = reference.box_iou_grad(a, b, g, offset=offset, mode=_mode(iof))
    else:
        _, d = reference.box_iou_grad(b, a, g.swapaxes(-1, -2), offset=offset, mode=_mode(iof))
    return _dispatch.from_numpy(d, own.dtype)


_fwd = _dispatch.register(
    "box_iou_fwd(Tensor boxes1, Tensor boxes2, int offset, bool iof) -> Tensor",
    _launch_fwd,
    _reference_fwd,
    _alloc_iou,
)
_bwd = _dispatch.register(
    "box_iou_bwd(Tensor grad, Tensor own, Tensor other, int offset, bool iof, bool own_is_first) "
    "-> Tensor",
    _launch_bwd,
    _reference_bwd,
    _alloc_grad,
)
