"""Deformable convolution (Dai et al., ICCV 2017; v2: Zhu et al., CVPR 2019).

    column[p, k, c] = mask[p, k] * image[c] at (position of tap k for pixel p) + offset[p, k]
    out[p, o] = sum over k and c of column[p, k, c] * weight[o, c, k]

between pixels by bilinear interpolation, and zero beyond the border.

Where a sample lies depends on offset and mask alone, not on the channel. So a plan is made once:
for each tap of each offset group and each output pixel the numbers of the four pixels around the
sample, and their weights; 32 bytes. A sample outside has pixels -1; of a sample across the border
the pixels outside have weight 0, and the number of a neighbour within. All other kernels work on
images whose channels are adjacent, [pixels, C]: 64 half-precision channels of a pixel are a line
of the cache. Each program reads the taps of one chunk of channels after another, so that they find
each other's pixels in L1.

Bytes, for P outputs, K taps, C channels in and Co out, s bytes each: the convolution must move
s (pixels C + P Co + K C Co) + 12 P G K; through L1 pass 4 s P K C. Operations: 2 P K C Co by tensor
cores and 8 P K C others. The columns, s P K C, exist nowhere in the fused kernels.
"""

import triton
import triton.language as tl

from ._deform import (
    address,
    chunk_start,
    four,
    interpolate,
    load_corner,
    locate,
    number_samples,
)


@triton.jit(do_not_specialize=["samples", "P", "pixels", "height", "width", "out_width"])
def deform_plan_kernel(
    offset_ptr,  # [images, 2 * G * K, pixels], read through its strides
    mask_ptr,  # [images, G * K, pixels], read through its strides, or None
    rows_ptr,  # [G * K, P, 4] int32
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    cells_ptr,  # [G * K, P] int32 | int64, or None: between which pixels, in each offset group
    samples,  # G * K * P
    P,  # images * pixels
    pixels,
    offset_strides,
    mask_strides,
    height,
    width,
    out_width,
    geometry,  # (K, kw, stride, padding and dilation by y and by x)
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK samples."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    sample, gk, image, pixel = number_samples(P, pixels, WIDE, BLOCK)
    live = sample < samples
    y, x, rest_y, rest_x, outside, unknown = locate(
        offset_ptr, offset_strides, image, pixel, gk, live, height, width, out_width, geometry, ACC
    )
    up, down = tl.where(y >= 0, 1 - rest_y, 0.0), tl.where(y + 1 < height, rest_y, 0.0)
    left, right = tl.where(x >= 0, 1 - rest_x, 0.0), tl.where(x + 1 < width, rest_x, 0.0)
    up, down = tl.where(outside, 0.0, up), tl.where(outside, 0.0, down)
    up, down = tl.where(unknown, float("nan"), up), tl.where(unknown, float("nan"), down)
    if mask_ptr is not None:
        at_mask = address(mask_strides, image, gk, pixel)
        m = tl.load(mask_ptr + at_mask, mask=live, other=0).to(ACC)
    else:
        m = tl.full((BLOCK,), 1.0, ACC)
    nowhere = outside | unknown
    first = (image * height).to(tl.int32)
    top = (first + tl.maximum(y, 0)) * width
    bottom = (first + tl.minimum(y + 1, height - 1)) * width
    x0, x1 = tl.maximum(x, 0), tl.minimum(x + 1, width - 1)
    rows = four(top + x0, top + x1, bottom + x0, bottom + x1, BLOCK)
    weights = four(up * left * m, up * right * m, down * left * m, down * right * m, BLOCK)
    at = sample.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(rows_ptr + at, tl.where(nowhere[:, None], -1, rows), mask=live[:, None])
    tl.store(weights_ptr + at, weights, mask=live[:, None])
    if cells_ptr is not None:
        images = (P // pixels).to(cells_ptr.dtype.element_ty)
        across = (width + 1).to(images.dtype)
        cell = (gk // geometry[0] * images + image.to(images.dtype)) * (height + 1) * across
        cell += (y + 1) * across + x + 1
        end = (samples // P // geometry[0]).to(images.dtype) * images * (height + 1) * across
        tl.store(cells_ptr + sample, tl.where(nowhere, end, cell), mask=live)


@triton.jit(do_not_specialize=["P", "pixels"])
def deform_sample_fwd_kernel(
    x_ptr,  # [pixels of all images, C]
    rows_ptr,  # [G * K, P, 4] int32
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    columns_ptr,  # written through its strides, by image, pixel, tap and channel
    P,
    pixels,  # of an output image
    strides,
    sizes,  # (C, C / offset groups)
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One program owns all taps of BM outputs in a chunk of channels."""
    stride_b, stride_p, stride_k, stride_c = strides
    tiles = tl.cdiv(pixels, BM)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    c, count = chunk_start(tl.program_id(1), sizes[1], EVEN, BK)
    group = c // sizes[1]
    inner = tl.arange(0, BK)[None, :]
    live = (pixel < pixels)[:, None] & (inner < count)
    sample = image * pixels + tl.minimum(pixel, pixels - 1)
    out_ptr = columns_ptr + image * stride_b + (c + inner).to(tl.int64) * stride_c
    for tap in range(K):
        value = interpolate(
            x_ptr, rows_ptr, weights_ptr, (group * K + tap).to(tl.int64) * P + sample,
            c + inner, inner < count, sizes[0], WIDE, PTX,
        )  # fmt: skip
        at = pixel[:, None] * stride_p + tl.cast(tap, tl.int64) * stride_k
        tl.store(out_ptr + at, value.to(columns_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["P"])
def deform_conv_fwd_kernel(
    x_ptr,  # [pixels of all images, C]
    rows_ptr,  # [G * K, P, 4] int32
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    w_ptr,  # [groups, K, C / groups, CO]
    bias_ptr,  # [groups * CO], or None
    out_ptr,  # [P, groups * CO]
    P,
    sizes,  # (C, C / groups, C / offset groups, run, CO)
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program owns [BM outputs, BN channels] of a weight group."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    C, per_group, per_offset, run, CO = sizes
    group = tl.program_id(1)
    tiles = tl.cdiv(CO, BN)
    p = (tl.program_id(0) // tiles).to(tl.int64) * BM + tl.arange(0, BM)
    o = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    sample = tl.minimum(p, P - 1)
    if not WIDE:
        sample = sample.to(tl.int32)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for i in range(per_group // run * tl.cdiv(run, BK) * K):
        c, count = chunk_start(i // K, run, EVEN, BK)
        tap = i % K
        first = group * per_group + c
        live = inner < count
        gk = (first // per_offset * K + tap).to(sample.dtype)
        value = interpolate(
            x_ptr, rows_ptr, weights_ptr, gk * P + sample,
            (first + inner)[None, :], live[None, :], C, WIDE, PTX,
        )  # fmt: skip
        at = (((group * K + tap) * per_group + c) + inner)[:, None] * CO + o[None, :]
        w = tl.load(w_ptr + at, mask=live[:, None] & (o < CO)[None, :], other=0)
        acc = tl.dot(value.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * CO + o, mask=o < CO, other=0)
        acc += bias.to(ACC)[None, :]
    at = p[:, None] * (tl.num_programs(1) * CO) + (group * CO + o)[None, :]
    live = (p < P)[:, None] & (o < CO)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _spread(
    each, x_ptr, rows_ptr, weights_ptr, d_x_ptr, sample, channels, live, C, sums, PTX: tl.constexpr
):
    """Give a gradient by columns, ``each`` [samples, channels], to what the columns are made of.

    To the image, by additions in memory; and to the sums [samples, 4] over channels of what
    ``each`` and a corner's pixel have in common, which are returned.
    """
    for corner in range(4):
        row = tl.load(rows_ptr + sample * 4 + corner)
        if x_ptr is not None:
            pixel = load_corner(x_ptr, row, channels, live, C, True, PTX)
            shared = tl.sum(pixel * each, axis=1)
            sums += tl.where(tl.arange(0, 4)[None, :] == corner, shared[:, None], 0.0)
        if d_x_ptr is not None:
            weight = tl.load(weights_ptr + sample * 4 + corner)
            seen = ((row >= 0) & (weight != 0))[:, None] & live
            at = row.to(tl.int64)[:, None] * C + channels
            tl.atomic_add(d_x_ptr + at, each * weight[:, None], mask=seen, sem="relaxed")
    return sums


@triton.jit(do_not_specialize=["P", "pixels"])
def deform_sample_bwd_kernel(
    grad_ptr,  # of the columns, read through its strides, by image, pixel, tap and channel
    x_ptr,  # [pixels of all images, C], or None without sums
    rows_ptr,  # [G * K, P, 4] int32
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    d_x_ptr,  # [pixels of all images, C] fp32 | fp64, to which is added, or None
    sums_ptr,  # [G * K, P, 4] fp32 | fp64, or None
    P,
    pixels,  # of an output image
    strides,
    sizes,  # (C, C / offset groups)
    K: tl.constexpr,
    PTX: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One program owns a tap of BM outputs, in all channels of its offset group."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    stride_b, stride_p, stride_k, stride_c = strides
    C, per_offset = sizes
    gk = tl.program_id(1)
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    sample = gk.to(tl.int64) * P + tl.minimum(p, P - 1)
    first = gk // K * per_offset
    inner = tl.arange(0, BK)[None, :]
    at = p // pixels * stride_b + p % pixels * stride_p + (gk % K).to(tl.int64) * stride_k
    sums = tl.zeros((BM, 4), ACC)
    for c in range(0, per_offset, BK):
        live = (p < P)[:, None] & (c + inner < per_offset)
        channels = (first + c + inner).to(tl.int64)
        each = tl.load(grad_ptr + at[:, None] + channels * stride_c, mask=live, other=0).to(ACC)
        sums = _spread(
            each, x_ptr, rows_ptr, weights_ptr, d_x_ptr, sample, channels, live, C, sums, PTX
        )
    if sums_ptr is not None:
        out = sums_ptr + sample[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out, sums, mask=(p < P)[:, None])


@triton.jit(do_not_specialize=["P"])
def deform_conv_bwd_kernel(
    grad_ptr,  # [P, groups * CO]
    w_ptr,  # [groups, K, C / groups, CO]
    x_ptr,  # [pixels of all images, C], or None without sums
    rows_ptr,  # [G * K, P, 4] int32
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    d_x_ptr,  # [pixels of all images, C] fp32 | fp64, to which is added, or None
    sums_ptr,  # [G * K, P, 4] fp32 | fp64, or None
    P,
    sizes,  # (C, C / groups, C / offset groups, run, CO)
    K: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program owns a tap of BM outputs, in all channels of its offset group."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    C, per_group, per_offset, run, CO = sizes
    gk = tl.program_id(1)
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    sample = gk.to(tl.int64) * P + tl.minimum(p, P - 1)
    inner, o = tl.arange(0, BK), tl.arange(0, BN)
    sums = tl.zeros((BM, 4), ACC)
    for i in range(per_offset // run * tl.cdiv(run, BK)):
        c, count = chunk_start(i, run, EVEN, BK)
        first = gk // K * per_offset + c
        group = first // per_group
        channels = first - group * per_group + inner  # of the weight group
        rows = p * (C // per_group * CO) + group * CO
        each = tl.zeros((BM, BK), ACC)
        for n in range(0, CO, BN):
            within = n + o < CO
            grad = tl.load(
                grad_ptr + rows[:, None] + (n + o)[None, :],
                mask=(p < P)[:, None] & within[None, :], other=0,
            )  # fmt: skip
            at = ((group * K + gk % K) * per_group + channels)[None, :] * CO + (n + o)[:, None]
            w = tl.load(w_ptr + at, mask=within[:, None] & (inner < count)[None, :], other=0)
            each = tl.dot(grad, w, each, input_precision=PRECISION, out_dtype=ACC)
        live = (p < P)[:, None] & (inner < count)[None, :]
        sums = _spread(
            each, x_ptr, rows_ptr, weights_ptr, d_x_ptr, sample,
            (first + inner).to(tl.int64)[None, :], live, C, sums, PTX,
        )  # fmt: skip
    if sums_ptr is not None:
        out = sums_ptr + sample[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out, sums, mask=(p < P)[:, None])


@triton.jit(do_not_specialize=["samples", "P", "pixels", "height", "width", "out_width"])
def deform_shift_bwd_kernel(
    sums_ptr,  # [G * K, P, 4] fp32 | fp64
    offset_ptr,  # [images, 2 * G * K, pixels], read through its strides
    mask_ptr,  # [images, G * K, pixels], read through its strides, or None
    d_offset_ptr,  # [images, 2 * G * K, pixels], or None
    d_mask_ptr,  # [images, G * K, pixels], or None
    samples,  # G * K * P
    P,
    pixels,
    offset_strides,
    mask_strides,
    height,
    width,
    out_width,
    geometry,  # (K, kw, stride, padding and dilation by y and by x)
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by offset and mask. One program owns BLOCK samples."""
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    sample, gk, image, pixel = number_samples(P, pixels, WIDE, BLOCK)
    live = sample < samples
    y, x, down, right, outside, unknown = locate(
        offset_ptr, offset_strides, image, pixel, gk, live, height, width, out_width, geometry, ACC
    )
    # Beyond the border, where the plan names a neighbour, there is nothing.
    north, south = (y >= 0) & live, (y + 1 < height) & live
    west, east = x >= 0, x + 1 < width
    s = sums_ptr + sample.to(tl.int64) * 4
    s0, s1 = tl.load(s, mask=north & west, other=0), tl.load(s + 1, mask=north & east, other=0)
    s2, s3 = tl.load(s + 2, mask=south & west, other=0), tl.load(s + 3, mask=south & east, other=0)
    at = (image.to(tl.int64) * (samples // P) + gk) * pixels + pixel
    if d_mask_ptr is not None:
        d = (s0 * (1 - right) + s1 * right) * (1 - down) + (s2 * (1 - right) + s3 * right) * down
        d = tl.where(unknown, float("nan"), tl.where(outside, 0.0, d))
        tl.store(d_mask_ptr + at, d.to(d_mask_ptr.dtype.element_ty), mask=live)
    if d_offset_ptr is not None:
        d_y = (s2 - s0) * (1 - right) + (s3 - s1) * right
        d_x = (s1 - s0) * (1 - down) + (s3 - s2) * down
        if mask_ptr is not None:
            at_mask = address(mask_strides, image, gk, pixel)
            m = tl.load(mask_ptr + at_mask, mask=live, other=0).to(ACC)
            d_y, d_x = d_y * m, d_x * m
        d_y = tl.where(unknown, float("nan"), tl.where(outside, 0.0, d_y))
        d_x = tl.where(unknown, float("nan"), tl.where(outside, 0.0, d_x))
        at = (image.to(tl.int64) * (samples // P) + gk) * (2 * pixels) + pixel
        tl.store(d_offset_ptr + at, d_y.to(d_offset_ptr.dtype.element_ty), mask=live)
        tl.store(d_offset_ptr + at + pixels, d_x.to(d_offset_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["P", "pixels", "images", "height", "width"])
def deform_gather_kernel(
    grad_ptr,  # of the columns, read through its strides, by image, pixel, tap and channel
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    order_ptr,  # [G * K * P] int64: samples, sorted by cell
    starts_ptr,  # [G * images * (H + 1) * (W + 1) + 1] int64: of the cells in that order
    d_x_ptr,  # [pixels of all images, C]
    P,
    pixels,  # of an output image
    strides,
    images,
    height,
    width,
    sizes,  # (C, C / offset groups)
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient by the image, added in a fixed order: by corner, then tap, then output.

    One program owns BM pixels in a chunk of channels, and reads the samples that lie in the four
    cells around each, between it and its neighbours.
    """
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    stride_b, stride_p, stride_k, stride_c = strides
    C, per_offset = sizes
    per_group = tl.cdiv(per_offset, BK)
    group = tl.program_id(1) // per_group
    c = tl.program_id(1) % per_group * BK + tl.arange(0, BK)
    q = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = q < images * height * width
    image, y, x = q // (height * width), q // width % height, q % width
    channels = (group * per_offset + c).to(tl.int64)[None, :]
    acc = tl.zeros((BM, BK), ACC)
    for corner in tl.static_range(4):
        row = ((group.to(tl.int64) * images + image) * (height + 1) + y + 1 - corner // 2) * (
            width + 1
        )
        cell = row + x + 1 - corner % 2
        start = tl.load(starts_ptr + cell, mask=live, other=0)
        count = tl.load(starts_ptr + cell + 1, mask=live, other=0) - start
        for i in range(tl.max(count, axis=0)):
            sample = tl.load(order_ptr + start + i, mask=i < count, other=0)
            weight = tl.load(weights_ptr + sample * 4 + corner, mask=i < count, other=0)
            p, tap = sample % P, sample // P % K
            at = p // pixels * stride_b + p % pixels * stride_p + tap * stride_k
            each = tl.load(
                grad_ptr + at[:, None] + channels * stride_c,
                mask=((i < count) & (weight != 0))[:, None] & (c < per_offset)[None, :], other=0,
            )  # fmt: skip
            acc += each.to(ACC) * weight[:, None]
    mask = live[:, None] & (c < per_offset)[None, :]
    tl.store(d_x_ptr + q[:, None] * C + channels, acc.to(d_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "span"])
def deform_conv_wgrad_kernel(
    grad_ptr,  # [P, groups * CO]
    x_ptr,  # [pixels of all images, C]
    rows_ptr,  # [G * K, P, 4] int32
    weights_ptr,  # [G * K, P, 4] fp32 | fp64
    d_w_ptr,  # [splits, groups, K, C / groups, CO] fp32 | fp64
    P,
    span,  # outputs of a split
    sizes,  # (C, C / groups, C / offset groups, run, CO)
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient by the weights. One program adds up one split of the outputs, for one tap and
    [BK, BN] channels of a weight group."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    C, per_group, per_offset, run, CO = sizes
    tiles = tl.cdiv(CO, BN)
    tap = tl.program_id(0) // tiles % K
    c, count = chunk_start(tl.program_id(0) // (tiles * K), run, EVEN, BK)
    group, split = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = group * per_group + c
    inner = tl.arange(0, BK)
    o = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    gk = (first // per_offset * K + tap).to(tl.int64)
    if not WIDE:
        gk = gk.to(tl.int32)
    acc = tl.zeros((BK, BN), ACC)
    end = tl.minimum((split + 1) * span, P)
    for start in range(split * span, end, BM):
        p = start + tl.arange(0, BM)
        value = interpolate(
            x_ptr, rows_ptr, weights_ptr, gk * P + tl.minimum(p, P - 1).to(gk.dtype),
            (first + inner)[None, :], (p < end)[:, None] & (inner < count)[None, :], C, WIDE, PTX,
        )  # fmt: skip
        at = p[:, None] * (C // per_group * CO) + (group * CO + o)[None, :]
        grad = tl.load(grad_ptr + at, mask=(p < end)[:, None] & (o < CO)[None, :], other=0)
        acc = tl.dot(
            tl.trans(value.to(grad.dtype)), grad, acc, input_precision=PRECISION, out_dtype=ACC
        )
    row = ((split * tl.num_programs(1) + group) * K + tap) * per_group + c
    at = (row + inner)[:, None] * CO + o[None, :]
    tl.store(d_w_ptr + at, acc, mask=(inner < count)[:, None] & (o < CO)[None, :])
