"""Deformable convolution (Dai et al., ICCV 2017; v2: Zhu et al., CVPR 2019), in float64.

An image is framed with a pixel of zeros, so that all four corners of a sample exist, and rows of
channels are taken from it, one corner after the other: all four at once take so much memory that
most of the time would go into getting it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Pair = tuple[int, int]
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of a sample's cell: is it lower, is it right


class Geometry(NamedTuple):
    """(y, x) of each."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


class _Samples(NamedTuple):
    """Where the taps of a kernel look, each [B, G, K, L] for G offset groups, K taps, L outputs."""

    rows: Array  # [2, 2, B, G, K, L]: of `_framed`, for the corners by y and by x
    y: Array  # distance from the upper corners, in [0, 1)
    x: Array  # distance from the left corners
    inside: Array
    unknown: Array  # where a coordinate is NaN


@np.errstate(invalid="ignore")  # bad data gives NaN
def sample(x: Array, offset: Array, mask: Array | None, geometry: Geometry) -> Array:
    """[B, C * K, L] float64: the columns that the convolution multiplies with its weights.

    x: [B, C, H, W]; offset: [B, 2 * G * K, Ho, Wo]; mask: [B, G * K, Ho, Wo]; L = Ho * Wo.
    """
    samples = _samples(x.shape, offset, geometry)
    pixels = _framed(x, samples)
    wy, wx = _weights(samples)
    values = np.zeros((*samples.y.shape, pixels.shape[1]))
    for j, i in CORNERS:
        values += pixels[samples.rows[j, i]] * (wy[j] * wx[i])[..., None]
    values[samples.unknown] = np.nan
    if mask is not None:
        values *= _by_sample(mask, samples)[..., None]
    return _to_columns(values)


@np.errstate(invalid="ignore")  # bad data gives NaN
def sample_grad(
    x: Array, offset: Array, mask: Array | None, geometry: Geometry, grad: Array
) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad * sample(...))`` by x, offset and mask (as if ones, if None)."""
    samples = _samples(x.shape, offset, geometry)
    pixels = _framed(x, samples)
    (b, c, height, width), (g, k, length) = x.shape, samples.y.shape[1:]
    each = grad.astype(np.float64).reshape(b, g, c // g, k, length).transpose(0, 1, 3, 4, 2)
    each = np.ascontiguousarray(each)
    m = np.ones_like(samples.y) if mask is None else _by_sample(mask, samples)
    wy, wx = _weights(samples)
    d_mask, d_y, d_x = np.zeros((3, *m.shape))
    d_pixels = np.zeros(pixels.size)
    for j, i in CORNERS:
        rows = samples.rows[j, i]
        # What the result grows by with the corner's weight, and the weight with y and with x.
        growth = (pixels[rows] * each).sum(-1)
        d_mask += wy[j] * wx[i] * growth
        d_y += m * (2 * j - 1) * wx[i] * growth
        d_x += m * (2 * i - 1) * wy[j] * growth
        # Of a sample that sees nothing the row is of the frame, which is cut off below.
        share = (wy[j] * wx[i] * m)[..., None] * each
        np.add.at(d_pixels, _elements(rows, c // g), share.reshape(-1))
    for d in (d_y, d_x):
        d[~samples.inside] = 0
    for d in (d_mask, d_y, d_x):
        d[samples.unknown] = np.nan
    d_image = d_pixels.reshape(b, height + 2, width + 2, c)[:, 1:-1, 1:-1]
    by_image = offset.shape[2:]
    return (
        np.ascontiguousarray(d_image.transpose(0, 3, 1, 2)),
        np.stack([d_y, d_x], 3).reshape(b, 2 * g * k, *by_image),
        d_mask.reshape(b, g * k, *by_image),
    )


@np.errstate(invalid="ignore")  # bad data gives NaN
def conv2d(
    x: Array,
    offset: Array,
    mask: Array | None,
    weight: Array,
    bias: Array | None,
    geometry: Geometry,
) -> Array:
    """[B, Co, Ho, Wo] float64; weight: [Co, C / groups, kh, kw]."""
    weights = _grouped(weight, x.shape[1])
    columns = sample(x, offset, mask, geometry)
    by_group = columns.reshape(len(x), len(weights), weights.shape[2], columns.shape[2])
    out = (weights @ by_group).reshape(x.shape[0], weight.shape[0], *offset.shape[2:])
    return out if bias is None else out + bias.astype(np.float64)[:, None, None]


@np.errstate(invalid="ignore")  # bad data gives NaN
def conv2d_grad(
    x: Array, offset: Array, mask: Array | None, weight: Array, geometry: Geometry, grad: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of ``sum(grad * conv2d(...))`` by x, offset, mask, weight and bias."""
    grad = grad.astype(np.float64)
    weights = _grouped(weight, x.shape[1])
    columns = sample(x, offset, mask, geometry)
    by_group = columns.reshape(len(x), len(weights), weights.shape[2], columns.shape[2])
    d_out = grad.reshape(len(x), *weights.shape[:2], columns.shape[2])
    d_columns = (weights.swapaxes(1, 2) @ d_out).reshape(columns.shape)
    d_weight = (d_out @ by_group.swapaxes(2, 3)).sum(0).reshape(weight.shape)
    by_sample = sample_grad(x, offset, mask, geometry, d_columns)
    return (*by_sample, d_weight, grad.sum((0, 2, 3)))


def _samples(shape: tuple[int, ...], offset: Array, geometry: Geometry) -> _Samples:
    b, _, height, width = shape
    (kh, kw), stride, padding, dilation = geometry
    groups = offset.shape[1] // (2 * kh * kw)
    out_h, out_w = offset.shape[2:]
    off = offset.astype(np.float64).reshape(b, groups, kh, kw, 2, out_h, out_w)
    y = off[:, :, :, :, 0] + (
        (np.arange(kh) * dilation[0] - padding[0])[:, None, None, None]
        + (np.arange(out_h) * stride[0])[:, None]
    )
    x = off[:, :, :, :, 1] + (
        (np.arange(kw) * dilation[1] - padding[1])[:, None, None] + np.arange(out_w) * stride[1]
    )
    inside = ~((y <= -1) | (y >= height) | (x <= -1) | (x >= width))
    unknown = inside & (np.isnan(y) | np.isnan(x))
    # Outside, and where it is not known where, all corners are in the frame.
    y, x = (np.where(inside & ~unknown, v, -1) for v in (y, x))
    y, x, inside, unknown = (
        v.reshape(b, groups, kh * kw, out_h * out_w) for v in (y, x, inside, unknown)
    )
    top, left = (np.floor(v).astype(np.int64) for v in (y, x))
    images = np.arange(b)[:, None, None, None] * ((height + 2) * (width + 2))
    pixels = images + (top + 1) * (width + 2) + left + 1
    first = pixels * groups + np.arange(groups)[:, None, None]
    known = inside & ~unknown
    step_y, step_x = (np.where(known, v, 0) for v in (groups * (width + 2), groups))
    rows = np.stack(
        [np.stack([first, first + step_x]), np.stack([first + step_y, first + step_y + step_x])]
    )
    return _Samples(rows, y - top, x - left, inside, unknown)


def _framed(x: Array, samples: _Samples) -> Array:
    """[B * (H + 2) * (W + 2) * G, C / G]: the pixels, zero beyond the border, group by group."""
    b, c, height, width = x.shape
    framed = np.zeros((b, height + 2, width + 2, c))
    framed[:, 1:-1, 1:-1] = x.transpose(0, 2, 3, 1)
    return framed.reshape(-1, c // samples.y.shape[1])


def _weights(samples: _Samples) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Of the corners, by y and by x; a corner's weight is the product of two."""
    return (1 - samples.y, samples.y), (1 - samples.x, samples.x)


def _elements(rows: Array, length: int) -> Array:
    """Where the elements of such rows lie, one after the other: numpy adds fastest to numbers."""
    return (rows[..., None] * length + np.arange(length)).reshape(-1)


def _by_sample(mask: Array, samples: _Samples) -> Array:
    return mask.astype(np.float64).reshape(samples.y.shape)


def _to_columns(values: Array) -> Array:
    """[B, G, K, L, C / G] to [B, C * K, L], channels before taps."""
    b, g, k, length, channels = values.shape
    return values.transpose(0, 1, 4, 2, 3).reshape(b, g * channels * k, length)


def _grouped(weight: Array, channels: int) -> Array:
    """[groups, Co / groups, C / groups * K] float64."""
    groups = channels // weight.shape[1]
    per_output = int(np.prod(weight.shape[1:]))
    return weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, per_output)
