"""Deformable convolution and its sampling: the public functions, their autograd, their ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _checks, _deform_ops, _dispatch
from ._deform_ops import Implementation
from .reference.deform import Geometry

Pair = int | tuple[int, int]


def deform_sample(
    input: Tensor,
    offset: Tensor,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""The columns of a deformable convolution: what each tap of its kernel sees.

    column[c, k, l] = mask[k, l] x_c(p(k, l) + offset[k, l]), with the position p of tap k for
    output l in a plain convolution, bilinear interpolation, and zero beyond the border (Dai et al.,
    ICCV 2017, eq. 2 to 4; mask: Zhu et al., CVPR 2019). With offsets of zero and no mask this is
    ``torch.nn.functional.unfold``.

    Args:
        input: [B, C, H, W], fp16, bf16, fp32 or fp64. Channels-last is read in place; of another
            format one copy is made.
        offset: [B, 2 G kh kw, Ho, Wo], in pixels, (y, x) for each tap, offset groups outermost; any
            float dtype. C must be a multiple of G.
        kernel_size, stride, padding, dilation: an int, or two, (y, x).
        mask: [B, G kh kw, Ho, Wo], any float dtype; None: ones, to the last bit.

    Returns:
        [B, C kh kw, Ho Wo] in the dtype of input, computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    See `deform_conv2d` for borders, bad data, gradients and determinism.
    """
    geometry = check_geometry(kernel_size, stride, padding, dilation)
    _check(input, offset, mask, geometry)
    columns: Tensor = _Sample.apply(_channels_last(input), offset, mask, geometry)
    return columns


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
    *,
    _implementation: Implementation | None = None,
) -> Tensor:
    r"""Deformable convolution, ``torchvision.ops.deform_conv2d``; with a mask the second version.

    out[o, l] = bias[o] + sum over c, k of weight[o, c, k] mask[k, l] x_c(p(k, l) + offset[k, l]),
    with the position p of tap k for output l in a plain convolution (Dai et al., ICCV 2017,
    eq. 2; mask: Zhu et al., CVPR 2019, eq. 1). Groups of weights and of offsets, G, follow from
    the shapes and are independent.

    Args:
        input: [B, C, H, W], fp16, bf16, fp32 or fp64. Channels-last is the fast format; of another
            one copy is made, and one of the result.
        offset: [B, 2 G kh kw, Ho, Wo], in pixels, (y, x) for each tap, offset groups outermost; any
            float dtype. C must be a multiple of G.
        weight: [Co, C / groups, kh, kw], in the dtype of input. Co must be a multiple of groups.
        bias: [Co], in the dtype of input, or None.
        stride, padding, dilation: an int, or two, (y, x).
        mask: [B, G kh kw, Ho, Wo], any float dtype; None: ones, to the last bit.

    Returns:
        [B, Co, Ho, Wo] in the dtype and the memory format of input. Products are added in fp32
        (fp64 for fp64); in fp32 TF32 is used as ``torch.backends.cuda.matmul`` allows. Under
        autocast input, weight and bias are cast to its dtype, offset and mask are not.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named
            in the message.

    A sample is 0 at y <= -1, y >= H, x <= -1 or x >= W; nearer, corners outside are 0. Coordinates
    are as exact as the offset (in fp32, unless input is fp64), on maps of any size. At integers,
    where interpolation has a kink, the gradient is that of the cell below and to the right;
    outside it is 0. A NaN in an offset makes its sample NaN, and the gradient by it, not the
    gradient by input. A pixel that is not finite spoils the samples that it is a corner of, a mask
    that is not finite its own.

    In half precision, and in fp32 with TF32, one kernel samples and multiplies, if groups leave it
    16 channels or more; else columns are sampled and torch multiplies, for as many images at a
    time as fit 512 MiB, but one at least. Besides the result forward takes the plan, 32 bytes per
    sample and offset group (48 in fp64), the weights in another order, and no columns in the
    former case. For backward the arguments are kept (input in channels-last format, a second copy
    if it was in another); to keep columns as well, multiply those of `deform_sample`. Backward
    computes the gradients that are needed, no others. That by input is summed by atomic additions,
    in an order, and so to a last bit, that differs from run to run; under
    ``torch.use_deterministic_algorithms`` in a fixed order, from columns' gradients in the dtype of
    input, which in fp16 may overflow; samples that all meet in one cell are then added one by
    one. All else is bitwise deterministic. No host synchronisation. Differentiating twice raises.
    """
    _checks.tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"weight must have shape [Co, C / groups, kh, kw], got {tuple(weight.shape)}"
        )
    kernel_size = (weight.shape[2], weight.shape[3])
    geometry = check_geometry(kernel_size, stride, padding, dilation)
    _check(input, offset, mask, geometry)
    if _dispatch.autocasting(input.device):
        input, weight, bias = (_autocast(t, input.device.type) for t in (input, weight, bias))
    _check_weight(input, weight, bias)
    x = _channels_last(input)
    out: Tensor = _Conv.apply(x, offset, mask, weight, bias, geometry, _implementation)
    if torch._C._are_functorch_transforms_active():
        return out
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return out if last else out.contiguous()


def _channels_last(t: Tensor) -> Tensor:
    """The format of the kernels, of which backward then keeps a copy, instead of making one.

    vmap cannot say what format a tensor is in: there each launch sees to it.
    """
    if torch._C._are_functorch_transforms_active():
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _autocast(t: Any, device: str) -> Any:
    if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(device))
    return t


def check_geometry(kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    def pair(name: str, value: Any, low: int) -> tuple[int, int]:
        both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        accepted = f"an integer, or two, of at least {low} and below 2**20"
        if len(both) != 2:
            raise ValueError(f"{name} must be {accepted}, got {value!r}")
        for one in both:
            _checks.integer(name, one, low, 2**20 - 1, accepted)
        return both

    return Geometry(
        pair("kernel_size", kernel_size, 1),
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
    )


def _check(input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry) -> None:
    _checks.tensor("input", input)
    if input.dim() != 4:
        raise ValueError(f"input must have shape [B, C, H, W], got {tuple(input.shape)}")
    _checks.dtype("input", input)
    b, c, height, width = input.shape
    if not 0 < c < 2**20 or height == 0 or width == 0:
        raise ValueError(
            "input must have pixels, and channels, fewer than 2**20, got shape "
            f"{tuple(input.shape)}"
        )
    if height >= 2**30 or width >= 2**30 or b * height * width >= 2**31:
        raise ValueError(f"input must have fewer than 2**31 pixels, got shape {tuple(input.shape)}")
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    out = _output_size(height, width, geometry)
    if out[0] < 1 or out[1] < 1:
        raise ValueError(
            f"input of {height} x {width} pixels is smaller than the kernel: the output would have "
            f"{out[0]} x {out[1]}"
        )
    _checks.tensor("offset", offset)
    if (
        offset.dim() != 4
        or (offset.shape[0], *offset.shape[2:]) != (b, *out)
        or offset.shape[1] == 0
        or offset.shape[1] % (2 * taps)
    ):
        raise ValueError(
            f"offset must have shape [{b}, 2 * G * {taps}, {out[0]}, {out[1]}] for G offset "
            f"groups, got {tuple(offset.shape)}"
        )
    groups = offset.shape[1] // (2 * taps)
    if c % groups:
        raise ValueError(
            f"offset has {groups} offset groups, of which input's {c} channels are no multiple"
        )
    if groups * taps >= 2**16 or b * out[0] * out[1] >= 2**31:
        raise ValueError(
            "offset must have fewer than 2**31 outputs and 2**16 taps in all groups, got shape "
            f"{tuple(offset.shape)}"
        )
    _checks.dtype("offset", offset)
    _checks.same_device("offset", offset, "input", input)
    if mask is not None:
        _checks.tensor("mask", mask)
        expected = (b, groups * taps, *out)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        _checks.dtype("mask", mask)
        _checks.same_device("mask", mask, "input", input)


def _check_weight(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _checks.same_device("weight", weight, "input", input)
    if weight.dtype != input.dtype:
        raise TypeError(f"weight must have the dtype of input, {input.dtype}, got {weight.dtype}")
    c, per_group = input.shape[1], weight.shape[1]
    if per_group == 0 or c % per_group or weight.shape[0] % (c // per_group):
        raise ValueError(
            f"weight must have shape [Co, {c} / groups, kh, kw] with Co a multiple of groups, got "
            f"{tuple(weight.shape)}"
        )
    if weight.numel() >= 2**31:
        raise ValueError(f"weight must have fewer than 2**31 elements, got {weight.numel()}")
    if bias is not None:
        _checks.tensor("bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias must have shape {(weight.shape[0],)}, one per channel of the output, got "
                f"{tuple(bias.shape)}"
            )
        if bias.dtype != input.dtype:
            raise TypeError(f"bias must have the dtype of input, {input.dtype}, got {bias.dtype}")
        _checks.same_device("bias", bias, "input", input)


def _output_size(height: int, width: int, geometry: Geometry) -> tuple[int, int]:
    (kh, kw), (step_y, step_x), (pad_y, pad_x), (spread_y, spread_x) = geometry
    return (
        (height + 2 * pad_y - spread_y * (kh - 1) - 1) // step_y + 1,
        (width + 2 * pad_x - spread_x * (kw - 1) - 1) // step_x + 1,
    )


class _Sample(_autograd.Function):
    @staticmethod
    def keep(
        ctx: Any, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry
    ) -> None:
        ctx.save_for_backward(input, offset, mask)
        ctx.geometry = geometry

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry
    ) -> Tensor:
        _Sample.keep(ctx, input, offset, mask, geometry)
        return _deform_ops.sample_fwd(input, offset, mask, *geometry)

    @staticmethod
    @_autograd.once_differentiable("deform_sample")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        found = iter(_deform_ops.sample_bwd(grad, *ctx.saved_tensors, *ctx.geometry, needs))
        return (*(next(found) if need else None for need in needs), None)


class _Conv(_autograd.Function):
    """``apply`` of the five tensors, the geometry and the implementation."""

    @staticmethod
    def keep(ctx: Any, *args: Any) -> None:
        ctx.save_for_backward(*args[:4])
        ctx.geometry, ctx.implementation = args[5:]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _Conv.keep(ctx, *args)
        *tensors, geometry, implementation = args
        return _deform_ops.conv_fwd(*tensors, *geometry[1:], implementation)

    @staticmethod
    @_autograd.once_differentiable("deform_conv2d")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *needs, needs_bias, _, _ = ctx.needs_input_grad
        found = iter(
            _deform_ops.conv_bwd(
                grad, *ctx.saved_tensors, *ctx.geometry[1:], needs, ctx.implementation
            )
            if any(needs)
            else ()
        )
        grads = [next(found) if need else None for need in needs]
        return (*grads, grad.sum((0, 2, 3)) if needs_bias else None, None, None)
