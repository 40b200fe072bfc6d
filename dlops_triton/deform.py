"""Deformable convolution and its sampling: the public functions, their autograd, their ops."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from . import _autograd, _checks, _deform, _dispatch
from .reference import deform as reference
from .reference.deform import Geometry

Pair = int | tuple[int, int]
Implementation = Literal["fused", "columns"]


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
    columns: Tensor = _Sample.apply(  # type: ignore[no-untyped-call]
        input.contiguous(memory_format=torch.channels_last), offset, mask, geometry
    )
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
    are as exact as the offset, on maps of any size, halves included. At integers, where
    interpolation has a kink, the gradient is that of the cell below and to the right; outside it
    is 0. A NaN in an offset makes its sample NaN, and the gradient by it, not the gradient by the
    input. A pixel that is not finite spoils the samples that it is a corner of.

    In half precision, and in fp32 with TF32, one kernel samples and multiplies; else columns are
    sampled and torch multiplies, for as many images at a time as fit 512 MiB. Besides the result
    forward takes the plan, 32 bytes per sample and offset group (48 in fp64), and no columns in
    the former case. Nothing but the arguments is kept for backward, which computes only the
    gradients that are needed. That by the input is summed by atomic additions, in an order, and
    so a last bit, that differs from run to run; under ``torch.use_deterministic_algorithms`` in a
    fixed order, from columns. All else is bitwise deterministic. No host synchronisation.
    Differentiating twice raises.
    """
    _checks.tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"weight must have shape [Co, C / groups, kh, kw], got {tuple(weight.shape)}"
        )
    kernel_size = (weight.shape[2], weight.shape[3])
    geometry = check_geometry(kernel_size, stride, padding, dilation)
    _check(input, offset, mask, geometry)
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias = (_autocast(t, input.device.type) for t in (input, weight, bias))
    _check_weight(input, weight, bias)
    x = input.contiguous(memory_format=torch.channels_last)
    out: Tensor = _Conv.apply(  # type: ignore[no-untyped-call]
        x, offset, mask, weight, bias, geometry, _implementation or _choose(x, weight, offset)
    )
    return out if input.is_contiguous(memory_format=torch.channels_last) else out.contiguous()


def _choose(input: Tensor, weight: Tensor, offset: Tensor) -> Implementation:
    """Fused where tensor cores multiply, and a chunk of channels fills them."""
    c, per_group = input.shape[1], weight.shape[1]
    taps = weight.shape[2] * weight.shape[3]
    run = math.gcd(per_group, c * 2 * taps // offset.shape[1])
    halves = input.dtype in (torch.float16, torch.bfloat16)
    fast = halves or _dispatch.precision(input.dtype) == "tf32"
    full = run >= 16 and weight.shape[0] * per_group >= 16 * c
    return "fused" if fast and full else "columns"


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
    if c == 0 or height == 0 or width == 0:
        raise ValueError(f"input must have channels and pixels, got shape {tuple(input.shape)}")
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
    shape = f"[{b}, 2 * G * {taps}, {out[0]}, {out[1]}] for G offset groups"
    if offset.dim() != 4 or (offset.shape[0], *offset.shape[2:]) != (b, *out):
        raise ValueError(f"offset must have shape {shape}, got {tuple(offset.shape)}")
    if offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(f"offset must have shape {shape}, got {tuple(offset.shape)}")
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


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(input, offset, mask)
        ctx.geometry = geometry
        return _sample_fwd(input, offset, mask, *geometry)

    @staticmethod
    @_autograd.once_differentiable("deform_sample")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        found = iter(_sample_bwd(grad, *ctx.saved_tensors, *ctx.geometry, needs))
        return (*(next(found) if need else None for need in needs), None)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        implementation: Implementation,
    ) -> Tensor:
        ctx.save_for_backward(input, offset, mask, weight)
        ctx.geometry = geometry
        ctx.implementation = implementation
        return _conv_fwd(input, offset, mask, weight, bias, *geometry[1:], implementation)

    @staticmethod
    @_autograd.once_differentiable("deform_conv2d")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *needs, needs_bias, _, _ = ctx.needs_input_grad
        found = iter(
            _conv_bwd(grad, *ctx.saved_tensors, *ctx.geometry[1:], needs, ctx.implementation)
            if any(needs)
            else ()
        )
        grads = [next(found) if need else None for need in needs]
        return (*grads, grad.sum((0, 2, 3)) if needs_bias else None, None, None)


def _alloc_columns(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    taps = kernel_size[0] * kernel_size[1]
    length = offset.shape[2] * offset.shape[3]
    return input.new_empty((input.shape[0], input.shape[1] * taps, length))


def _alloc_grads(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    *args: Any,
) -> list[Tensor]:
    """Of sampling, or, if a weight follows the mask, of the convolution."""
    weights, needs = (args[:1], args[-2]) if isinstance(args[0], Tensor) else ((), args[-1])
    like = torch.channels_last
    grads = [torch.empty_like(input, memory_format=like) if needs[0] else None]
    for t, need in zip((offset, mask, *weights), needs[1:], strict=True):
        grads.append(t.new_empty(t.shape) if need and t is not None else None)
    return [t for t in grads if t is not None]


def _alloc_out(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *_: Any,
) -> Tensor:
    return torch.empty(
        (input.shape[0], weight.shape[0], offset.shape[2], offset.shape[3]),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )


def _launch_sample_fwd(
    input: Tensor, offset: Tensor, mask: Tensor | None, *geometry: list[int]
) -> Tensor:
    columns = _alloc_columns(input, offset, mask, *geometry)
    if columns.numel():
        x = _deform.channels_last(input)
        plan = _deform.make_plan(x, offset, mask, _pairs(geometry))
        _deform.sample(x, plan, _by_tap(columns, input))
    return columns


def _launch_sample_bwd(
    grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, *args: Any
) -> list[Tensor]:
    if input.numel() == 0:
        return _alloc_grads(grad, input, offset, mask, *args)
    *geometry, needs = args
    x, columns = _deform.channels_last(input), _by_tap(grad.contiguous(), input)
    found = _deform.grads_of_columns(columns, x, offset, mask, _pairs(geometry), *needs)
    return [t for t in found if t is not None]


def _launch_conv_fwd(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> Tensor:
    out = _alloc_out(input, offset, mask, weight)
    if out.numel():
        *geometry, implementation = args
        run = _deform.conv_by_columns if implementation == "columns" else _deform.conv
        pairs = _pairs((weight.shape[2:], *geometry))
        run(_deform.channels_last(input), offset, mask, weight, bias, pairs, out)
    return out


def _launch_conv_bwd(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *args: Any,
) -> list[Tensor]:
    if grad.numel() == 0:
        return [t.zero_() for t in _alloc_grads(grad, input, offset, mask, weight, *args)]
    *geometry, needs, implementation = args
    run = _deform.conv_grads_by_columns if implementation == "columns" else _deform.conv_grads
    x, rows = _deform.channels_last(input), _deform.channels_last(grad).flatten(0, 2)
    pairs = _pairs((weight.shape[2:], *geometry))
    found = run(rows, x, offset, mask, weight, pairs, needs)
    return [t for t in found if t is not None]


def _pairs(geometry: Any) -> Geometry:
    return Geometry(*(tuple(pair) for pair in geometry))


def _by_tap(columns: Tensor, input: Tensor) -> Tensor:
    """[B, C * K, L] as [B, L, K, C]."""
    b, c = input.shape[:2]
    return columns.view(b, c, columns.shape[1] // c, -1).permute(0, 3, 2, 1)


def _arrays(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else _dispatch.to_numpy(t) for t in tensors]


def _reference_sample_fwd(
    input: Tensor, offset: Tensor, mask: Tensor | None, *geometry: list[int]
) -> Tensor:
    x, o, m = _arrays(input, offset, mask)
    columns = reference.sample(x, o, m, _pairs(geometry))
    return _dispatch.from_numpy(columns, input.dtype)


def _reference_sample_bwd(
    grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, *args: Any
) -> list[Tensor]:
    *geometry, needs = args
    x, o, m, g = _arrays(input, offset, mask, grad)
    found = reference.sample_grad(x, o, m, _pairs(geometry), g)
    return _filled(_alloc_grads(grad, input, offset, mask, *args), found, needs)


def _reference_conv_fwd(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> Tensor:
    x, o, m, w, b = _arrays(input, offset, mask, weight, bias)
    out = reference.conv2d(x, o, m, w, b, _pairs((weight.shape[2:], *args[:-1])))
    return _alloc_out(input, offset, mask, weight).copy_(_dispatch.from_numpy(out, input.dtype))


def _reference_conv_bwd(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *args: Any,
) -> list[Tensor]:
    *geometry, needs, _ = args
    x, o, m, w, g = _arrays(input, offset, mask, weight, grad)
    found = reference.conv2d_grad(x, o, m, w, _pairs((weight.shape[2:], *geometry)), g)
    return _filled(_alloc_grads(grad, input, offset, mask, weight, *args), found[:4], needs)


def _filled(grads: list[Tensor], found: Any, needs: list[bool]) -> list[Tensor]:
    wanted = (d for d, need in zip(found, needs, strict=True) if need)
    return [t.copy_(torch.from_numpy(d)) for t, d in zip(grads, wanted, strict=True)]


_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
_sample_fwd = _dispatch.register(
    "deform_sample_fwd(Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, "
    f"{_GEOMETRY}) -> Tensor",
    _launch_sample_fwd,
    _reference_sample_fwd,
    _alloc_columns,
)
_sample_bwd = _dispatch.register(
    "deform_sample_bwd(Tensor grad, Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, "
    f"{_GEOMETRY}, bool[] needs) -> Tensor[]",
    _launch_sample_bwd,
    _reference_sample_bwd,
    _alloc_grads,
)
_conv_fwd = _dispatch.register(
    "deform_conv_fwd(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, str implementation) -> Tensor",
    _launch_conv_fwd,
    _reference_conv_fwd,
    _alloc_out,
)
_conv_bwd = _dispatch.register(
    "deform_conv_bwd(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    f"{_GEOMETRY}, bool[] needs, str implementation) -> Tensor[]",
    _launch_conv_bwd,
    _reference_conv_bwd,
    _alloc_grads,
)
