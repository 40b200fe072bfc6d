"""Deformable convolutions as mmcv and detectron2 have them, under mmcv's names."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor
from torch import nn as torch_nn

from dlops_triton import deform, nn
from dlops_triton.deform import Pair

from ._common import renamed


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """``mmcv.ops.deform_conv2d``, version 1, by :func:`dlops_triton.deform_conv2d`.

    Args:
        input: [B, C, H, W], floating point.
        offset: [B, 2 G kh kw, Ho, Wo], (y, x) for each tap.
        weight: [Co, C / groups, kh, kw].
        stride, padding, dilation: an int, or two, (y, x).
        groups: of weights.
        deform_groups: G, groups of channels with offsets of their own.
        bias: must be False.
        im2col_step: not needed and not used: any batch size goes.

    Returns:
        [B, Co, Ho, Wo] in the dtype of offset, to which input and weight are cast.

    Raises:
        ValueError: ``bias``, or a wrong shape.

    Differs from mmcv: coordinates are fp32 in half precision; non-contiguous and empty batches
    work; gradients are the same in each run under ``torch.use_deterministic_algorithms(True)``.
    """
    if bias:
        raise ValueError(f"bias must be False, got {bias!r}")
    return _convolve(
        input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups
    )


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """``mmcv.ops.modulated_deform_conv2d``, version 2, by :func:`dlops_triton.deform_conv2d`.

    Args:
        input, offset, weight, stride, padding, dilation, groups, deform_groups: as in
            :func:`deform_conv2d`.
        mask: [B, G kh kw, Ho, Wo].
        bias: [Co] or None.

    Returns:
        [B, Co, Ho, Wo] in the dtype of offset, to which the other tensors are cast.
    """
    return _convolve(
        input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
    )


def _convolve(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    deform_groups: int,
) -> Tensor:
    if not input.dim() == offset.dim() == weight.dim() == 4:
        raise ValueError(
            "input, offset and weight must have four dimensions, got shapes "
            f"{tuple(input.shape)}, {tuple(offset.shape)} and {tuple(weight.shape)}"
        )
    per_group, kh, kw = weight.shape[1:]
    for name, value, size, what in (
        ("groups", groups, per_group * groups == input.shape[1], "weight"),
        ("deform_groups", deform_groups, offset.shape[1] == 2 * deform_groups * kh * kw, "offset"),
    ):
        if not size:
            shape = tuple(weight.shape if what == "weight" else offset.shape)
            raise ValueError(
                f"{name} must agree with {what} of shape {shape} for an input of "
                f"{input.shape[1]} channels, got {value!r}"
            )
    dtype = offset.dtype
    return deform.deform_conv2d(
        input.to(dtype),
        offset,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        stride,
        padding,
        dilation,
        None if mask is None else mask.to(dtype),
    )


class _Layer(nn._DeformConv2d):
    """What mmcv's two layers without a convolution for the offsets share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        deform_groups: int,
        bias: bool,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.deform_groups = deform_groups
        # What code that takes any convolution, mmcv's ConvModule, looks for.
        self.transposed = False
        self.output_padding = (0,)


class DeformConv2d(_Layer):
    """``mmcv.ops.DeformConv2d``: :func:`deform_conv2d` with its weight.

    Args:
        in_channels: C, channels of the input.
        out_channels: Co, channels of the result.
        kernel_size, stride, padding, dilation: an int, or two, (y, x).
        groups: of weights.
        deform_groups: groups of channels with offsets of their own.
        bias: must be False.
        im2col_step: not needed and not used.

    The weight starts as mmcv's does, uniform for a ReLU. An input smaller than the kernel is
    padded, and the output cut, as mmcv does.
    """

    @renamed(deformable_groups="deform_groups")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ):
        if bias:
            raise ValueError(f"bias must be False, got {bias!r}")
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deform_groups, bias),
        )
        self.im2col_step = im2col_step
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        torch_nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """[B, Co, Ho, Wo] of x, [B, C, H, W], and offset, [B, 2 G kh kw, Ho, Wo]."""
        low = [max(k - size, 0) for k, size in zip(self.kernel_size, x.shape[2:], strict=True)]
        if any(low):
            x, offset = (F.pad(t, (0, low[1], 0, low[0])) for t in (x, offset))
        out = deform_conv2d(
            *(x, offset, self.weight, self.stride, self.padding, self.dilation),
            *(self.groups, self.deform_groups),
        )
        return out[:, :, : out.shape[2] - low[0], : out.shape[3] - low[1]]


class ModulatedDeformConv2d(_Layer):
    """``mmcv.ops.ModulatedDeformConv2d``: :func:`modulated_deform_conv2d` with its weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups: as
            in :class:`DeformConv2d`.
        bias: add a learnt bias.

    The weight starts uniform within 1 / sqrt(C kh kw), the bias at zero, as mmcv's.
    """

    @renamed(deformable_groups="deform_groups")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deform_groups, bias),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weight anew; the bias becomes zero."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        torch_nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch_nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """[B, Co, Ho, Wo] of x, offset and mask, [B, G kh kw, Ho, Wo]."""
        return modulated_deform_conv2d(
            *(x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation),
            *(self.groups, self.deform_groups),
        )


class DeformConv2dPack(nn.DeformConv2dPack):
    """``mmcv.ops.DeformConv2dPack``, "DCN": :class:`dlops_triton.nn.DeformConv2dPack`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups,
            bias, im2col_step: as in :class:`DeformConv2d`.
    """

    @renamed(deformable_groups="deform_groups")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ):
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deform_groups, bias),
        )
        self.im2col_step = im2col_step

    def init_offset(self) -> None:
        """Set ``conv_offset`` to zero."""
        for parameter in self.conv_offset.parameters():
            torch_nn.init.zeros_(parameter)


class ModulatedDeformConv2dPack(nn.ModulatedDeformConv2dPack):
    """``mmcv.ops.ModulatedDeformConv2dPack``, "DCNv2": the class of that name in `nn`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups,
            bias: as in :class:`ModulatedDeformConv2d`.
    """

    @renamed(deformable_groups="deform_groups")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deform_groups, bias),
        )

    def init_weights(self) -> None:
        """Draw the weight anew; bias and ``conv_offset`` become zero."""
        self.reset_parameters()
