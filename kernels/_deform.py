"""Where the taps of a deformable convolution look, and what they see.

A tap at the position p of the plain convolution, shifted by d, lies at p + floor(d) and the rest
of d along each axis. p is an integer, so that the rest is as exact as d on maps of any size.
"""

import triton
import triton.language as tl

from ._math import to_fp32


@triton.jit
def _along(position, shift, size):
    """Whole and fractional part of a coordinate, and whether a NaN leaves it open."""
    far = 1073741824.0  # converts to an integer, and the sum does not overflow
    bounded = tl.minimum(tl.maximum(shift, -far), far)
    floor = tl.floor(bounded)
    whole = position + floor.to(tl.int32)
    rest = bounded - floor
    unknown = shift != shift
    outside = (whole < -1) | (whole >= size) | ((whole == -1) & (rest == 0))
    return whole, rest, outside & (unknown == 0), unknown


@triton.jit
def number_samples(P, pixels, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A program's samples, tap by tap: their numbers, taps (of all offset groups), images and
    pixels."""
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if not WIDE:
        sample = sample.to(tl.int32)  # whose division is quick
    gk, p = (sample // P).to(tl.int32), sample % P
    return sample, gk, p // pixels, (p % pixels).to(tl.int32)


@triton.jit
def address(strides, image, gk, pixel):
    """Of tap ``gk`` in a tensor read through its strides by image, channel and pixel."""
    at = image.to(tl.int64) * strides[0] + gk.to(tl.int64) * strides[1]
    return at + pixel.to(tl.int64) * strides[2]


@triton.jit
def locate(
    offset_ptr,
    strides,
    image,
    pixel,
    gk,
    live,
    height,
    width,
    out_width,
    geometry,
    ACC: tl.constexpr,
):
    """Samples of tap ``gk`` (offset groups outermost) for output pixels: y, x, their rests,
    whether they lie outside, and whether it is unknown where, for a coordinate is NaN.

    strides: of the offset, by image, channel and pixel; geometry: (K, kw, then stride,
    padding and dilation, each by y and by x).
    """
    taps, across, step_y, step_x, pad_y, pad_x, spread_y, spread_x = geometry
    tap = gk % taps
    at = address(strides, image, gk * 2, pixel)
    d_y = tl.load(offset_ptr + at, mask=live, other=0).to(ACC)
    d_x = tl.load(offset_ptr + at + strides[1], mask=live, other=0).to(ACC)
    y_0 = pixel // out_width * step_y - pad_y + tap // across * spread_y
    x_0 = pixel % out_width * step_x - pad_x + tap % across * spread_x
    y, rest_y, above, open_y = _along(y_0, d_y, height)
    x, rest_x, beside, open_x = _along(x_0, d_x, width)
    outside = above | beside
    return y, x, rest_y, rest_x, outside, (open_y | open_x) & (outside == 0)


@triton.jit
def four(a, b, c, d, BLOCK: tl.constexpr):
    """[BLOCK, 4] of four [BLOCK]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK, 4))


@triton.jit
def load_plan(rows_ptr, weights_ptr, sample):
    at = sample * 4
    r0, r1 = tl.load(rows_ptr + at), tl.load(rows_ptr + at + 1)
    r2, r3 = tl.load(rows_ptr + at + 2), tl.load(rows_ptr + at + 3)
    w0, w1 = tl.load(weights_ptr + at), tl.load(weights_ptr + at + 1)
    w2, w3 = tl.load(weights_ptr + at + 2), tl.load(weights_ptr + at + 3)
    return r0, r1, r2, r3, w0, w1, w2, w3


@triton.jit
def load_corner(x_ptr, row, channels, live, C, WIDE: tl.constexpr, PTX: tl.constexpr):
    """[samples, channels] of a corner; 0 where the sample lies outside, whose row is -1.

    Through L1, from which other taps and samples read the pixel again.
    """
    if WIDE:
        row = row.to(tl.int64)
    seen = (row >= 0)[:, None] & live
    at = row[:, None] * C + channels
    corner = tl.load(x_ptr + at, mask=seen, other=0, cache_modifier=".ca")
    if corner.dtype == tl.float64:
        return corner
    else:
        return to_fp32(corner, PTX)


@triton.jit
def interpolate(
    x_ptr, rows_ptr, weights_ptr, sample, channels, live, C, WIDE: tl.constexpr, PTX: tl.constexpr
):
    """[samples, channels] of the image between the pixels, times the mask; in fp32 or fp64."""
    r0, r1, r2, r3, w0, w1, w2, w3 = load_plan(rows_ptr, weights_ptr, sample)
    value = load_corner(x_ptr, r0, channels, live, C, WIDE, PTX) * w0[:, None]
    value += load_corner(x_ptr, r1, channels, live, C, WIDE, PTX) * w1[:, None]
    value += load_corner(x_ptr, r2, channels, live, C, WIDE, PTX) * w2[:, None]
    value += load_corner(x_ptr, r3, channels, live, C, WIDE, PTX) * w3[:, None]
    return value


@triton.jit
def chunk_start(chunk, run, EVEN: tl.constexpr, BK: tl.constexpr):
    """First channel of a chunk, and how many channels from there on it may hold.

    Chunks part runs of channels that share their weight group and their offset group. EVEN: a run
    is a multiple of BK.
    """
    if EVEN:
        return chunk * BK, BK
    else:
        per_run = tl.cdiv(run, BK)
        within = chunk % per_run * BK
        return chunk // per_run * run + within, run - within
