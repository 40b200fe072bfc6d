"""The ops as detectron2, and fvcore for it, have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlops_triton.deform import Pair
from dlops_triton.iou import box_iou as _native_box_iou

from . import torchvision
from ._deform import deform_conv2d, modulated_deform_conv2d
from .torchvision import nms

__all__ = [
    "DeformConv",
    "ModulatedDeformConv",
    "batched_nms",
    "ciou_loss",
    "deform_conv",
    "diou_loss",
    "giou_loss",
    "modulated_deform_conv",
    "nms",
    "pairwise_iou",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_jit",
]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """``detectron2.layers.batched_nms``, by :func:`dlops_triton.batched_nms`.

    Args:
        boxes, scores, idxs, iou_threshold: as in
            :func:`dlops_triton.compat.torchvision.batched_nms`.

    Returns:
        int64 [K], indices by descending score.

    Differs from detectron2 as that function does from torchvision: classes are not shifted apart.
    """
    return torchvision.batched_nms(boxes.float(), scores, idxs, iou_threshold)


def pairwise_iou(boxes1: Any, boxes2: Any) -> Tensor:
    """``detectron2.structures.pairwise_iou``, by :func:`dlops_triton.box_iou`.

    Args:
        boxes1: ``Boxes``, or another object whose ``tensor`` is [N, 4].
        boxes2: the same, of M boxes.

    Returns:
        [N, M], in the dtype of the boxes; 0 where nothing is shared.
    """
    return _native_box_iou(boxes1.tensor, boxes2.tensor)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = -1,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    """``fvcore.nn.sigmoid_focal_loss``, whose ``alpha`` is off by default.

    Args:
        inputs, targets, alpha, gamma, reduction: as in
            :func:`dlops_triton.compat.torchvision.sigmoid_focal_loss`.

    Returns:
        The loss, fp32 whatever the dtype of inputs.

    Differs from fvcore: an unknown reduction and an ``alpha`` above 1 raise; gradients are finite
    for every gamma; the mean of nothing is 0, not NaN.
    """
    return torchvision.sigmoid_focal_loss(inputs.float(), targets.float(), alpha, gamma, reduction)


# fvcore's scripted function; here there is nothing to script.
sigmoid_focal_loss_jit = sigmoid_focal_loss


def giou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``fvcore.nn.giou_loss``, by :func:`dlops_triton.generalized_box_iou_loss`.

    Args:
        boxes1, boxes2, reduction, eps: as in
            :func:`dlops_triton.compat.torchvision.generalized_box_iou_loss`.

    Returns:
        The loss, fp32, or fp64 for fp64 boxes.

    Differs from fvcore: it does not wait for the GPU to see whether boxes are inside out, which
    raises there; fp16 boxes are computed in fp32, where fvcore's areas overflow.
    """
    return torchvision.generalized_box_iou_loss(boxes1, boxes2, reduction, eps)


def diou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``detectron2.layers.diou_loss``, by :func:`dlops_triton.distance_box_iou_loss`.

    Args:
        boxes1, boxes2, reduction, eps: as in :func:`giou_loss`.

    Returns:
        The loss, fp32, or fp64 for fp64 boxes.
    """
    return torchvision.distance_box_iou_loss(boxes1, boxes2, reduction, eps)


def ciou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``detectron2.layers.ciou_loss``, by :func:`dlops_triton.complete_box_iou_loss`.

    Args:
        boxes1, boxes2, reduction, eps: as in :func:`giou_loss`.

    Returns:
        The loss, fp32, or fp64 for fp64 boxes. The angle of a point is 0, not NaN.
    """
    return torchvision.complete_box_iou_loss(boxes1, boxes2, reduction, eps)


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    """``detectron2.layers.deform_conv.deform_conv``, on CPU tensors as well.

    Args:
        input, offset, weight, stride, padding, dilation, groups, deformable_groups: as in
            :func:`dlops_triton.compat.mmcv.deform_conv2d`.
        im2col_step: not needed and not used: any batch size goes.

    Returns:
        [B, Co, Ho, Wo] in the dtype of offset.

    Differs from detectron2: coordinates are fp32 in half precision; on a CPU there is a gradient,
    and any ``deformable_groups``.
    """
    return deform_conv2d(
        input, offset, weight, stride, padding, dilation, groups, deformable_groups
    )


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """``detectron2.layers.deform_conv.modulated_deform_conv``, on CPU tensors as well.

    Args:
        input, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups: as
            in :func:`dlops_triton.compat.mmcv.modulated_deform_conv2d`.

    Returns:
        [B, Co, Ho, Wo] in the dtype of offset.

    Differs from detectron2 as :func:`deform_conv`; there it has no CPU version at all.
    """
    return modulated_deform_conv2d(
        *(input, offset, mask, weight, bias),
        *(stride, padding, dilation, groups, deformable_groups),
    )


class _DeformConv(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        deformable_groups: int,
        bias: bool,
        norm: nn.Module | None,
        activation: Callable[[Tensor], Tensor] | None,
    ):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"in_channels and out_channels must be multiples of groups, {groups}, got "
                f"{in_channels} and {out_channels}"
            )
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, "
            f"deformable_groups={self.deformable_groups}, bias={self.bias is not None}"
        )

    def _finish(self, out: Tensor) -> Tensor:
        if self.norm is not None:
            out = self.norm(out)
        return out if self.activation is None else self.activation(out)

    def _settings(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.deformable_groups


class DeformConv(_DeformConv):
    """``detectron2.layers.DeformConv``: :func:`deform_conv` with its weight.

    Args:
        in_channels: C, channels of the input.
        out_channels: Co, channels of the result.
        kernel_size, stride, padding, dilation: an int, or two, (y, x).
        groups: of weights.
        deformable_groups: groups of channels with offsets of their own.
        bias: must be False.
        norm: a layer, or None, that follows.
        activation: a function, or None, that follows it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        if bias:
            raise ValueError(f"bias must be False, got {bias!r}")
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deformable_groups, bias, norm, activation),
        )

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """[B, Co, Ho, Wo] of x, [B, C, H, W], and offset, [B, 2 G kh kw, Ho, Wo]."""
        return self._finish(deform_conv(x, offset, self.weight, *self._settings()))


class ModulatedDeformConv(_DeformConv):
    """``detectron2.layers.ModulatedDeformConv``: :func:`modulated_deform_conv` with its weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            deformable_groups, norm, activation: as in :class:`DeformConv`.
        bias: add a learnt bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deformable_groups, bias, norm, activation),
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """[B, Co, Ho, Wo] of x, offset and mask, [B, G kh kw, Ho, Wo]."""
        out = modulated_deform_conv(x, offset, mask, self.weight, self.bias, *self._settings())
        return self._finish(out)
