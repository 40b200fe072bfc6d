"""Modules over the functions, with the constructors and the state of mmdet, mmcv, torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks, _scripting, deform, ghm
from .deform import Pair
from .reference import ghm as reference


class _GHM(nn.Module):
    """Edges and momentum's state, which stay as they are when the module's dtype changes."""

    edges: Tensor
    acc_sum: Tensor | None
    steps: Tensor | None

    def __init__(
        self,
        mu: float | None,
        bins: int,
        momentum: float,
        loss_weight: float,
        reduction: str,
        bias_correction: bool,
        process_group: dist.ProcessGroup | None,
    ):
        super().__init__()
        ghm.check_options(mu, bins, momentum, reduction, loss_weight)
        self.bins = bins
        self.momentum = momentum
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.process_group = process_group
        self.register_buffer("edges", torch.from_numpy(reference.edges(bins, mu)))
        self.acc_sum = self.steps = None
        if momentum > 0:
            del self.acc_sum
            self.register_buffer("acc_sum", torch.zeros(bins))
            if bias_correction:
                del self.steps
                self.register_buffer("steps", torch.zeros(bins, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _GHM:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return (
            f"bins={self.bins}, momentum={self.momentum}, loss_weight={self.loss_weight}, "
            f"reduction={self.reduction!r}"
        )

    def _loss(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None,
        mu: float | None,
        avg_factor: float | Tensor | None,
        reduction_override: str | None,
    ) -> Tensor:
        _checks.choice("reduction_override", reduction_override, (None, "none", "mean", "sum"))
        reduction = reduction_override or self.reduction
        return ghm.loss(
            pred, target, label_weight, mu, self.bins, self.momentum, self.acc_sum, reduction,
            self.loss_weight, avg_factor, self.steps, self.process_group, update=self.training,
        )  # fmt: skip


class GHMC(_GHM):
    """``dlops_triton.ghmc_loss`` with its state; a drop-in for mmdet's ``GHMC``.

    Args:
        bins: number of intervals.
        momentum: average the counts over calls.
        use_sigmoid: must be True.
        loss_weight: factor of the result.
        reduction: "none", "sum" or "mean".
        bias_correction: correct the average's start from zero; adds a buffer ``steps``.
        process_group: over whose ranks counts are summed.

    The buffers and the keys of ``state_dict`` are mmdet's: ``edges``, and with momentum
    ``acc_sum``. They stay fp32 in a module converted to another dtype, and change in training with
    gradients enabled only. ``edges`` are there to be saved: ``bins`` alone decides.
    """

    def __init__(
        self,
        bins: int = 10,
        momentum: float = 0,
        use_sigmoid: bool = True,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        *,
        bias_correction: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(
            None, bins, momentum, loss_weight, reduction, bias_correction, process_group
        )
        if use_sigmoid is not True:
            raise ValueError(f"use_sigmoid must be True, got {use_sigmoid!r}")
        self.use_sigmoid = use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss. Other keywords are ignored, as in mmdet, whose heads pass an ``avg_factor``
        that GHM-C does not want: it divides by the number of elements that count."""
        return self._loss(pred, target, label_weight, None, None, reduction_override)


class GHMR(_GHM):
    """``dlops_triton.ghmr_loss`` with its state; a drop-in for mmdet's ``GHMR``.

    Args:
        mu: where the loss turns from quadratic to linear.
        bins: number of intervals.
        momentum: average the counts over calls.
        loss_weight: factor of the result.
        reduction: "none", "sum" or "mean".
        bias_correction: correct the average's start from zero; adds a buffer ``steps``.
        process_group: over whose ranks counts are summed.

    The state is as that of ``GHMC``. ``avg_factor``, which mmdet ignores, replaces the divisor.
    """

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        *,
        bias_correction: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(mu, bins, momentum, loss_weight, reduction, bias_correction, process_group)
        self.mu = mu

    def extra_repr(self) -> str:
        return f"mu={self.mu}, {super().extra_repr()}"

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss."""
        return self._loss(pred, target, label_weight, self.mu, avg_factor, reduction_override)


class _DeformConv2d(nn.Module):
    """Weight, bias and geometry of a deformable convolution."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        bias: bool,
    ):
        super().__init__()
        channels = {"in_channels": in_channels, "out_channels": out_channels}
        for name, value in {**channels, "groups": groups}.items():
            _checks.integer(name, value, 1, 2**31 - 1, "an integer of at least 1, below 2**31")
        for name, value in channels.items():
            _divisible(name, value, "groups", groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        geometry = deform.check_geometry(kernel_size, stride, padding, dilation)
        self.kernel_size, self.stride, self.padding, self.dilation = geometry
        self.groups = groups
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else f"{text}, bias=False"

    def _convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        return deform.deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )


class DeformConv2d(_DeformConv2d):
    """``dlops_triton.deform_conv2d`` with its weight; a drop-in for torchvision's ``DeformConv2d``.

    Args:
        in_channels: C, channels of the input.
        out_channels: Co, channels of the result.
        kernel_size, stride, padding, dilation: an int, or two, (y, x).
        groups: of weights; C and Co must be multiples of it.
        bias: add a learnt bias.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the message.

    The keys of ``state_dict`` are torchvision's: ``weight``, [Co, C / groups, kh, kw], and with
    bias ``bias``, [Co]. Both start uniform, as ``nn.Conv2d``'s do, within 1 / sqrt(C / groups kh
    kw), with the same numbers as torchvision's from the same seed. Offset groups follow from the
    shape of the offset. Unlike torchvision's, whose ``repr`` and attributes it has, it checks
    sizes when it is made, and cannot be scripted.
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
        bias: bool = True,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, Co, Ho, Wo] of input [B, C, H, W], offset [B, 2 G kh kw, Ho, Wo] and mask [B, G kh
        kw, Ho, Wo]; see `deform_conv2d`, also for what it raises."""
        return self._convolve(input, offset, mask)


class _Pack(_DeformConv2d):
    """A plain convolution, zero at first, gives the offsets, and with ``_PER_TAP`` 3 the mask."""

    _version = 2
    _PER_TAP: int

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
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        accepted = "an integer of at least 1, below 2**31"
        _checks.integer("deform_groups", deform_groups, 1, 2**31 - 1, accepted)
        _divisible("in_channels", in_channels, "deform_groups", deform_groups)
        self.deform_groups = deform_groups
        # What code that takes any convolution, mmcv's ConvModule, looks for.
        self.transposed = False
        self.output_padding = (0,)
        self.conv_offset = nn.Conv2d(
            in_channels,
            deform_groups * self._PER_TAP * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bias and ``conv_offset`` become zero; the weight is drawn as its class has it."""
        for parameter in (self.bias, *self.conv_offset.parameters()):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        groups = f", deform_groups={self.deform_groups}" if self.deform_groups != 1 else ""
        return super().extra_repr() + groups

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """In version 1 ``conv_offset`` of ``conv2`` was its neighbour ``conv2_offset``."""
        if (local_metadata.get("version") or 1) < 2:
            for name in ("weight", "bias"):
                old, new = f"{prefix[:-1]}_offset.{name}", f"{prefix}conv_offset.{name}"
                if old in state_dict and new not in state_dict:
                    state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class DeformConv2dPack(_Pack):
    """Deformable convolution that finds its offsets; a drop-in for mmcv's ``DeformConv2dPack``.

    Args:
        in_channels: C, channels of the input.
        out_channels: Co, channels of the result.
        kernel_size, stride, padding, dilation: an int, or two, (y, x).
        groups: of weights; C and Co must be multiples of it.
        deform_groups: G, groups of channels with offsets of their own; C must be a multiple of it.
        bias: must be False.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the message.

    mmcv's name for it is "DCN". ``conv_offset``, an ``nn.Conv2d`` with bias, gives the offset, [B,
    2 G kh kw, Ho, Wo], laid out as `deform_conv2d` takes it. It starts at zero, so that the
    module starts as a plain convolution; the weight starts uniform within sqrt(6 / (C / groups kh
    kw)).

    The keys of ``state_dict`` are mmcv's: ``weight``, ``conv_offset.weight``,
    ``conv_offset.bias``; its version is 2. Of version 1, where the offsets' convolution was a
    neighbour (``conv2_offset`` of ``conv2``), names are changed in loading, where the loader shows
    a module its neighbours' keys, as mmengine's does. ``torch.nn.Module.load_state_dict`` of a
    model around it does not, neither with mmcv's: change the names first.

    Unlike mmcv's it has no ``im2col_step`` and no ``deformable_groups``, checks sizes when it is
    made, and takes inputs smaller than the kernel, if padding makes up for it.
    """

    _PER_TAP = 2

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
    ):
        if bias:
            raise ValueError(f"bias must be False, got {bias!r}")
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, deform_groups, bias),
        )

    def reset_parameters(self) -> None:
        """Draw the weight anew; ``conv_offset`` becomes zero."""
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, Co, Ho, Wo] of x, [B, C, H, W]; see `deform_conv2d`, also for what it raises."""
        return self._convolve(x, self.conv_offset(x), None)


class ModulatedDeformConv2dPack(_Pack):
    """The second version, with a mask; a drop-in for mmcv's ``ModulatedDeformConv2dPack``.

    Args:
        in_channels: C, channels of the input.
        out_channels: Co, channels of the result.
        kernel_size, stride, padding, dilation: an int, or two, (y, x).
        groups: of weights; C and Co must be multiples of it.
        deform_groups: G, groups of channels with offsets and a mask of their own; C must be a
            multiple of it.
        bias: add a learnt bias.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the message.

    mmcv's name for it is "DCNv2". ``conv_offset``, an ``nn.Conv2d`` with bias, gives [B, 3 G kh kw,
    Ho, Wo]: first the offset, all 2 G kh kw channels of it, as `deform_conv2d` takes it, then
    what the mask is the sigmoid of. It starts at zero, so that the module starts as half a
    plain convolution; the weight starts uniform within 1 / sqrt(C kh kw), the bias at zero.

    The keys of ``state_dict`` are mmcv's: ``weight``, with bias ``bias``, ``conv_offset.weight``,
    ``conv_offset.bias``. Version 1 is loaded as by ``DeformConv2dPack``. Unlike mmcv's it has no
    ``deformable_groups`` and checks sizes when it is made.
    """

    _PER_TAP = 3

    def reset_parameters(self) -> None:
        """Draw the weight anew; bias and ``conv_offset`` become zero."""
        super().reset_parameters()
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Co, Ho, Wo] of x, [B, C, H, W]; see `deform_conv2d`, also for what it raises."""
        both = self.conv_offset(x)
        taps = both.shape[1] // 3
        return self._convolve(x, both[:, : 2 * taps], both[:, 2 * taps :].sigmoid())


def _divisible(name: str, channels: int, by: str, groups: int) -> None:
    if channels % groups:
        raise ValueError(f"{name} must be a multiple of {by}, {groups}, got {channels}")


for _module in (GHMC, GHMR, DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack):
    _module.__prepare_scriptable__ = _scripting.refused(  # type: ignore[union-attr]
        f"dlops_triton.nn.{_module.__name__}"
    )
