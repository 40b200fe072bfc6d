"""The ops of the deformable convolution: forward and backward, by kernels and by the reference.

Fused, kernels sample and multiply at once. By columns, a kernel samples and torch multiplies, for
so many images at a time that the columns keep to a limit.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from . import _deform, _dispatch
from .reference import deform as reference
from .reference.deform import Geometry

Implementation = Literal["fused", "columns"]

# Bytes of columns that exist at a time where there must be any.
columns_limit = 2**29


def _choose(x: Tensor, offset: Tensor, weight: Tensor) -> Implementation:
    """Fused where tensor cores multiply and a chunk of channels fills them."""
    c, per_group = x.shape[3], weight.shape[1]
    offset_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    run = math.gcd(per_group, c // offset_groups)
    outputs = len(weight) * per_group // c
    halves = x.dtype in (torch.float16, torch.bfloat16)
    fast = halves or _dispatch.precision(x.dtype, x.device) == "tf32"
    return "fused" if fast and min(run, outputs) >= 16 else "columns"


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


def _alloc_out(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *_: Any
) -> Tensor:
    return torch.empty(
        (input.shape[0], weight.shape[0], offset.shape[2], offset.shape[3]),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )


def _alloc_grads(*tensors: Tensor | None, needs: list[bool]) -> list[Tensor]:
    """Those by an image, which is in channels-last format, and other tensors that are needed."""
    image, *others = (t if need else None for t, need in zip(tensors, needs, strict=True))
    like = torch.channels_last
    first = [] if image is None else [torch.empty_like(image, memory_format=like)]
    return first + [t.new_empty(t.shape) for t in others if t is not None]


def _alloc_sample_grads(
    grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, *args: Any
) -> list[Tensor]:
    return _alloc_grads(input, offset, mask, needs=args[-1])


def _alloc_conv_grads(
    grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *args: Any
) -> list[Tensor]:
    return _alloc_grads(input, offset, mask, weight, needs=args[-2])


# An exported graph calls the ops without an autograd.Function around them, and weights in it may
# require a gradient: what torch does for the kernels below must not ask for one.
@torch.no_grad()
def _launch_sample_fwd(
    input: Tensor, offset: Tensor, mask: Tensor | None, *geometry: list[int]
) -> Tensor:
    columns = _alloc_columns(input, offset, mask, *geometry)
    if columns.numel():
        x = _deform.channels_last(input)
        plan = _deform.make_plan(x, offset, mask, _pairs(geometry))
        _deform.sample(x, plan, _by_pixel(columns, input))
    return columns


@torch.no_grad()
def _launch_sample_bwd(
    grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, *args: Any
) -> list[Tensor]:
    if input.numel() == 0:
        return _alloc_sample_grads(grad, input, offset, mask, *args)
    *pairs, needs = args
    x, geometry = _deform.channels_last(input), _pairs(pairs)
    plan = _deform.make_plan(x, offset, mask, geometry, cells=_in_order(needs))
    columns = _by_pixel(grad.contiguous(), input)
    found = _data_grads(columns, x, plan, offset, mask, geometry, needs)
    return [t for t in found if t is not None]


@torch.no_grad()
def _launch_conv_fwd(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> Tensor:
    out = _alloc_out(input, offset, mask, weight)
    if out.numel() == 0:
        return out
    *pairs, implementation = args
    geometry = _pairs((weight.shape[2:], *pairs))
    x, w = _deform.channels_last(input), _by_tap(weight, input)
    rows = _deform.channels_last(out).flatten(0, 2)
    if (implementation or _choose(x, offset, weight)) == "fused":
        _deform.conv(x, _deform.make_plan(x, offset, mask, geometry), w, bias, rows)
        return out
    groups, *_, outputs = w.shape
    rows = rows.view(len(x), -1, groups, outputs)
    plus = None if bias is None else bias.view(groups, 1, outputs)
    for part in _parts(x, offset, w.shape[1]):
        plan = _deform.make_plan(x[part], offset[part], _slice(mask, part), geometry)
        columns = _columns(x[part], plan, groups)
        _product(columns, w.flatten(1, 2), plus, out=rows[part].flatten(0, 1).transpose(0, 1))
        del columns  # before there are others
    return out


@torch.no_grad()
def _launch_conv_bwd(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *args: Any,
) -> list[Tensor]:
    if grad.numel() == 0:
        return [t.zero_() for t in _alloc_conv_grads(grad, input, offset, mask, weight, *args)]
    *pairs, needs, implementation = args
    geometry = _pairs((weight.shape[2:], *pairs))
    x, rows = _deform.channels_last(input), _deform.channels_last(grad).flatten(0, 2)
    w = _by_tap(weight, input)
    given = x, offset, mask, w, geometry
    if (implementation or _choose(x, offset, weight)) == "columns":
        *data, d_w = _grads_by_columns(rows, *given, needs)
    elif _in_order(needs):
        # Sorted, samples need their gradients in memory.
        *data, _ = _grads_by_columns(rows, *given, [*needs[:3], False])
        d_w = _fused_grads(rows, *given, [False, False, False, needs[3]])[3]
    else:
        *data, d_w = _fused_grads(rows, *given, needs)
    if d_w is not None:
        d_w = d_w.permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype).contiguous()
    return [t for t in (*data, d_w) if t is not None]


def _fused_grads(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    w: Tensor,
    geometry: Geometry,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Those by x, offset, mask and w that are needed, from that by the output, [P, Co]."""
    if not any(needs):
        return (None,) * 4
    needs_x, needs_offset, needs_mask, needs_weight = needs
    plan = _deform.make_plan(x, offset, mask, geometry)
    data: tuple[Tensor | None, ...] = (None, None, None)
    if needs_x or needs_offset or needs_mask:
        d_x, sums = _deform.conv_data_grads(grad, x, plan, w, needs_x, needs_offset or needs_mask)
        data = _finish(d_x, sums, x, offset, mask, geometry, needs[:3])
    return *data, _deform.conv_weight_grad(grad, x, plan, w) if needs_weight else None


def _grads_by_columns(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    w: Tensor,
    geometry: Geometry,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """As `_fused_grads`, with torch's matrix products."""
    groups, taps, per_group, outputs = w.shape
    by_image = grad.view(len(x), -1, groups, outputs)
    d_w = None
    parts = []
    for part in _parts(x, offset, taps):
        where = offset[part], _slice(mask, part)
        plan = _deform.make_plan(x[part], *where, geometry, cells=_in_order(needs))
        rows = by_image[part].flatten(0, 1).transpose(0, 1)
        if needs[3]:
            columns = _columns(x[part], plan, groups)
            share = _product(columns.transpose(1, 2), rows).to(plan.weights.dtype)
            d_w = share if d_w is None else d_w + share
            del columns  # before there are others
        if any(needs[:3]):
            each = _product(rows, w.flatten(1, 2).transpose(1, 2))
            each = each.view(groups, -1, taps, per_group).permute(1, 2, 0, 3)
            each = each.reshape(-1, plan.pixels, taps, x.shape[3])
            parts.append(_data_grads(each, x[part], plan, *where, geometry, needs[:3]))
            del each
    data = [_joined([found[i] for found in parts]) for i in range(3)]
    return *data, None if d_w is None else d_w.view(w.shape)


def _data_grads(
    grad: Tensor,
    x: Tensor,
    plan: _deform.Plan,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Those by x, offset and mask that are needed, from that by columns, [B, L, K, C]."""
    needs_x, needs_offset, needs_mask = needs
    d_x, sums = _deform.sample_grads(grad, x, plan, needs_x, needs_offset or needs_mask)
    return _finish(d_x, sums, x, offset, mask, geometry, needs)


def _finish(
    d_x: Tensor | None,
    sums: Tensor | None,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    d_input = None if d_x is None else d_x.to(x.dtype).permute(0, 3, 1, 2)
    if sums is None:
        return d_input, None, None
    return d_input, *_deform.shift_grads(sums, x, offset, mask, geometry, *needs[1:])


def _in_order(needs: list[bool]) -> bool:
    """Whether the gradient by the image must be summed in a fixed order."""
    return needs[0] and torch.are_deterministic_algorithms_enabled()


def _parts(x: Tensor, offset: Tensor, taps: int) -> list[slice]:
    """Images by their numbers, so many at a time that their columns keep to the limit."""
    pixels = offset.shape[2] * offset.shape[3]
    bytes_per_image = taps * pixels * x.shape[3] * x.element_size()
    count = _dispatch.cdiv(len(x), max(1, columns_limit // bytes_per_image))
    step = _dispatch.cdiv(len(x), count)
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _product(a: Tensor, b: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b + plus, in the dtype given: a backward pass may run under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b, out=out) if plus is None else torch.baddbmm(plus, a, b, out=out)


def _columns(x: Tensor, plan: _deform.Plan, groups: int) -> Tensor:
    """[groups, P, K * C / groups]."""
    c = x.shape[3]
    columns = x.new_empty((len(x), plan.pixels, plan.taps, c))
    _deform.sample(x, plan, columns)
    split = columns.view(plan.size, plan.taps, groups, c // groups).permute(2, 0, 1, 3)
    return split.reshape(groups, plan.size, -1)


def _slice(t: Tensor | None, part: slice) -> Tensor | None:
    return None if t is None else t[part]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [t for t in parts if t is not None]
    return torch.cat(found) if len(found) > 1 else (found[0] if found else None)


def _by_tap(weight: Tensor, input: Tensor) -> Tensor:
    """[Co, C / groups, kh, kw] as [groups, K, C / groups, Co / groups]."""
    per_group = weight.shape[1]
    groups = input.shape[1] // per_group
    w = weight.reshape(groups, len(weight) // groups, per_group, -1)
    return w.permute(0, 3, 2, 1).contiguous()


def _by_pixel(columns: Tensor, input: Tensor) -> Tensor:
    """[B, C * K, L] as [B, L, K, C]."""
    b, c = input.shape[:2]
    return columns.view(b, c, columns.shape[1] // c, -1).permute(0, 3, 2, 1)


def _pairs(geometry: Any) -> Geometry:
    return Geometry(*(tuple(pair) for pair in geometry))


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
    return _filled(_alloc_sample_grads(grad, input, offset, mask, *args), found, needs)


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
    return _filled(_alloc_conv_grads(grad, input, offset, mask, weight, *args), found[:4], needs)


def _filled(grads: list[Tensor], found: Any, needs: list[bool]) -> list[Tensor]:
    wanted = (d for d, need in zip(found, needs, strict=True) if need)
    return [t.copy_(torch.from_numpy(d)) for t, d in zip(grads, wanted, strict=True)]


_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
sample_fwd = _dispatch.register(
    "deform_sample_fwd(Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, "
    f"{_GEOMETRY}) -> Tensor",
    _launch_sample_fwd,
    _reference_sample_fwd,
    _alloc_columns,
)
sample_bwd = _dispatch.register(
    "deform_sample_bwd(Tensor grad, Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, "
    f"{_GEOMETRY}, bool[] needs) -> Tensor[]",
    _launch_sample_bwd,
    _reference_sample_bwd,
    _alloc_sample_grads,
)
conv_fwd = _dispatch.register(
    "deform_conv_fwd(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, str? implementation) -> Tensor",
    _launch_conv_fwd,
    _reference_conv_fwd,
    _alloc_out,
)
conv_bwd = _dispatch.register(
    "deform_conv_bwd(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    f"{_GEOMETRY}, bool[] needs, str? implementation) -> Tensor[]",
    _launch_conv_bwd,
    _reference_conv_bwd,
    _alloc_conv_grads,
)
