"""Sigmoid focal loss (Lin et al., 2017), elementwise, for hard and soft targets.

With p = sigmoid(x), q = 1 - p and a target t in [0, 1]:

    u     = p (1 - t) + q t                         = 1 - p_t
    B     = |x| (1 - t if x >= 0 else t) + log(1 + exp(-|x|))     binary cross-entropy with logits
    L     = alpha_t u^gamma B,                      alpha_t = alpha t + (1 - alpha) (1 - t)
    dL/dx = alpha_t u^gamma [p (1 - t) - q t + gamma (1 - 2 t) (p q / u) B]

p, q and B come from one exp(-|x|), and u and B are sums of terms of one sign, so nothing
overflows or cancels however large x is, and gamma = 0 is plain cross-entropy. p q / u is at most
1; it is taken as 0 once u underflows, where u^gamma is already 0.

Reduced losses of labels are computed with their gradient in one launch, for one exp and one
reciprocal per element. Nearly all elements are negatives of rows that count:

    L     = (1 - alpha) p^gamma log(1 + exp(x))
    dL/dx = (1 - alpha) p^gamma [p + gamma q log(1 + exp(x))]

and a positive is that of -x with its sign turned and alpha. So a program first finds which of its
blocks hold a positive or an ignored row. The others need no label, no row, no mask and no select.

Bytes per element of s bytes: reduced labels s, with the gradient 2 s, and 8 per row. Otherwise
forward "none" 2 s, reduced s; backward 2 s (3 s for "none"); an integer label costs 8 bytes per row
of classes, a dense target its own size per element.
Instructions per element on sm_90, bf16, gamma 2: reduced labels 16.7, with the gradient 21.6 (an
NVIDIA build without inline PTX 18.2 and 23.1); labels "none" 71 forward, 96 backward.
"""

import triton
import triton.language as tl

from ._loss import sum_over_programs
from ._math import guarded_ratio, logistic, nan_max, nan_min, power, sigmoid_pair

# How the targets and the weights are laid out: one per element, or one per row of classes.
NONE = tl.constexpr(0)
PER_ROW = tl.constexpr(1)
PER_ELEMENT = tl.constexpr(2)


@triton.jit
def _target_and_weight(
    target_ptr,  # PER_ROW: [outer, inner] any integer; PER_ELEMENT: as x_ptr, float or bool
    weight_ptr,  # NONE: None; PER_ROW: [outer, inner]; PER_ELEMENT: as x_ptr
    base,
    local,
    mask,
    num_classes,
    inner,
    IGNORE_INDEX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TARGETS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Target in [0, 1], weight, and which elements count, for elements base + local."""
    # One 64-bit division per program; the per-element ones stay in 32 bits.
    plane = num_classes * inner
    first = base // plane
    within = (base - first * plane).to(tl.int32) + local
    if inner == 1:
        row = first + within // num_classes
        column = within % num_classes
    else:
        i = within % inner
        row = (first + within // plane) * inner + i
        column = within // inner % num_classes
    counts = mask
    if TARGETS == PER_ROW:
        label = tl.load(target_ptr + row, mask=mask, other=0).to(tl.int64)
        t = tl.where(label == column, 1.0, 0.0).to(ACC)
        counts = mask & (label != IGNORE_INDEX)
    else:
        t = tl.load(target_ptr + base + local, mask=mask, other=0).to(ACC)
        # Averaged soft labels leave [0, 1] by a rounding, where u could turn negative.
        t = nan_min(nan_max(t, 0.0), 1.0)
    if SMOOTHING != 0:
        t = t * (1 - SMOOTHING) + 0.5 * SMOOTHING
    if WEIGHTS == PER_ROW:
        w = tl.load(weight_ptr + row, mask=mask, other=0).to(ACC)
    elif WEIGHTS == PER_ELEMENT:
        w = tl.load(weight_ptr + base + local, mask=mask, other=0).to(ACC)
    else:
        w = tl.full(local.shape, 1.0, ACC)
    return t, w, counts


@triton.jit
def _alpha_t(t, ALPHA: tl.constexpr):
    if ALPHA is None:
        return t * 0 + 1
    else:
        return ALPHA * t + (1 - ALPHA) * (1 - t)


@triton.jit
def focal_fwd_kernel(
    x_ptr,  # [outer, C, inner] fp16 | bf16 | fp32 | fp64
    target_ptr,
    weight_ptr,
    out_ptr,  # REDUCE: [programs] ACC, else as x_ptr
    n,  # outer * C * inner
    num_classes,
    inner,
    ALPHA: tl.constexpr,  # None: no alpha
    GAMMA: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TARGETS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK consecutive elements; reduced, it writes their sum."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    base = pid * BLOCK
    local = tl.arange(0, BLOCK)
    mask = local < tl.minimum(n - base, BLOCK).to(tl.int32)
    x = tl.load(x_ptr + base + local, mask=mask, other=0).to(ACC)
    t, w, counts = _target_and_weight(
        target_ptr, weight_ptr, base, local, mask, num_classes, inner,
        IGNORE_INDEX, SMOOTHING, TARGETS, WEIGHTS, ACC,
    )  # fmt: skip
    p, q, softplus = sigmoid_pair(x)
    u = p * (1 - t) + q * t
    bce = tl.abs(x) * tl.where(x >= 0, 1 - t, t) + softplus
    loss = w * _alpha_t(t, ALPHA) * power(u, GAMMA) * bce
    # A select, not a product: an ignored row may hold NaN.
    loss = tl.where(counts, loss, 0.0)
    if REDUCE:
        tl.store(out_ptr + pid, tl.sum(loss, axis=0))
    else:
        tl.store(out_ptr + base + local, loss.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def focal_bwd_kernel(
    x_ptr,  # [outer, C, inner]
    target_ptr,
    weight_ptr,
    grad_ptr,  # SCALAR_GRAD: [1], else as x_ptr; gradient of the loss
    dx_ptr,
    n,
    num_classes,
    inner,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TARGETS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SCALAR_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK consecutive elements."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    base = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    mask = local < tl.minimum(n - base, BLOCK).to(tl.int32)
    x = tl.load(x_ptr + base + local, mask=mask, other=0).to(ACC)
    t, w, counts = _target_and_weight(
        target_ptr, weight_ptr, base, local, mask, num_classes, inner,
        IGNORE_INDEX, SMOOTHING, TARGETS, WEIGHTS, ACC,
    )  # fmt: skip
    if SCALAR_GRAD:
        g = tl.load(grad_ptr).to(ACC)
    else:
        g = tl.load(grad_ptr + base + local, mask=mask, other=0).to(ACC)
    p, q, softplus = sigmoid_pair(x)
    u = p * (1 - t) + q * t
    slope = p * (1 - t) - q * t
    if GAMMA != 0:
        bce = tl.abs(x) * tl.where(x >= 0, 1 - t, t) + softplus
        slope += GAMMA * (1 - 2 * t) * guarded_ratio(p * q, u) * bce
    dx = g * w * _alpha_t(t, ALPHA) * power(u, GAMMA) * slope
    dx = tl.where(counts, dx, 0.0)
    tl.store(dx_ptr + base + local, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _background(x, GAMMA: tl.constexpr, PTX: tl.constexpr):
    """Loss and derivative of loaded logits as negatives, alpha aside."""
    p, q, softplus = logistic(x, PTX)
    focus = power(p, GAMMA)
    slope = p
    if GAMMA != 0:
        slope += GAMMA * q * softplus
    return focus * softplus, focus * slope


@triton.jit
def _any_block(
    x_ptr, dx_ptr, label, at, column, mask, factor,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, IGNORE_INDEX: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The losses of elements ``at``, of class ``column`` in rows of ``label``."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(x_ptr + at, mask=mask, other=0)
    positive = label == column
    loss, slope = _background(tl.where(positive, -x, x), GAMMA, PTX)
    counts = mask & (label != IGNORE_INDEX)
    if ALPHA is not None:
        alpha = tl.where(positive, ALPHA, 1 - ALPHA).to(ACC)
        loss *= alpha
        slope *= alpha
    if dx_ptr is not None:
        # Selects, not products: an ignored row may hold NaN, and the factor may be infinite.
        dx = tl.where(counts, tl.where(positive, -slope, slope) * factor, 0.0)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return tl.where(counts, loss, 0.0)


@triton.jit
def _negative_block(
    x_ptr, dx_ptr, at, total, factor,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``total`` plus the losses of elements ``at``, alpha aside, all of which are negatives."""
    loss, slope = _background(tl.load(x_ptr + at), GAMMA, PTX)
    if dx_ptr is not None:
        if ALPHA is not None:
            factor *= 1 - ALPHA
        tl.store(dx_ptr + at, (slope * factor).to(dx_ptr.dtype.element_ty))
    return total + loss


@triton.jit
def _factor(divisor_ptr, scale, ACC: tl.constexpr):
    """What the loss and its gradient are multiplied by."""
    factor = tl.cast(scale, ACC)  # in the interpreter it is a Python number
    if divisor_ptr is not None:
        factor /= tl.load(divisor_ptr).to(ACC)
    return factor


@triton.jit
def _finish(negatives, others, factor, out_ptr, counter_ptr, ALPHA: tl.constexpr):
    """Write the loss, once every program has its share."""
    share = tl.sum(negatives, axis=0)
    if ALPHA is not None:
        share *= 1 - ALPHA
    share += tl.sum(others, axis=0)
    total, last = sum_over_programs(share, out_ptr + 1, counter_ptr)
    if last:
        tl.store(out_ptr, total * factor)


@triton.jit
def focal_rows_kernel(
    x_ptr,  # [N, C]
    label_ptr,  # [N] any integer
    divisor_ptr,  # None, or [1]
    dx_ptr,  # None, or [N, C]: the gradient of the loss
    out_ptr,  # [1 + programs] ACC: the loss, and scratch
    counter_ptr,  # [1] int32, 0
    n,  # N * C
    num_classes,
    scale,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The classes of a row are neighbours. A program owns up to 31 blocks of consecutive elements,
    as many as the others."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = 128
    size = tl.cdiv(tl.cdiv(n, BLOCK), tl.num_programs(0)) * BLOCK
    start = tl.program_id(0).to(tl.int64) * size
    owned = tl.maximum(tl.minimum(n - start, size), 0).to(tl.int32)
    first = start // num_classes
    offset = (first * num_classes - start).to(tl.int32)  # of the first row, at most 0

    # One bit for each block with a positive, an ignored row or an end.
    bits = tl.zeros((ROWS,), tl.int32)
    for r in range(0, tl.cdiv(owned - offset, num_classes), ROWS):
        row = r + tl.arange(0, ROWS)
        begin = offset + row * num_classes
        mask = begin < owned
        label = tl.load(label_ptr + first + row, mask=mask, other=-1).to(tl.int64)
        ignored = mask & (label == IGNORE_INDEX)
        # The elements that are not plain negatives: one, or those of a row.
        where = tl.where((label >= 0) & (label < num_classes), begin + label.to(tl.int32), -1)
        low = tl.where(ignored, tl.maximum(begin, 0), where)
        high = tl.where(ignored, tl.minimum(begin + num_classes, owned) - 1, where)
        inside = mask & (low >= 0) & (low < owned)
        blocks = (2 << (tl.maximum(high, 0) // BLOCK)) - (1 << (tl.maximum(low, 0) // BLOCK))
        bits |= tl.where(inside, blocks, 0)
    special = tl.reduce_or(bits, axis=0) | ((owned % BLOCK != 0).to(tl.int32) << (owned // BLOCK))

    factor = _factor(divisor_ptr, scale, ACC)
    lane = tl.arange(0, BLOCK)
    negatives = tl.zeros((BLOCK,), ACC)
    for k in range(owned // BLOCK):
        if ((special >> k) & 1) == 0:
            negatives = _negative_block(
                x_ptr, dx_ptr, start + k * BLOCK + lane, negatives, factor, ALPHA, GAMMA, PTX
            )
    # Smaller blocks, for fewer registers.
    PART: tl.constexpr = BLOCK // 4
    others = tl.zeros((PART,), ACC)
    if special != 0:
        for part in range(tl.cdiv(owned, PART)):
            if ((special >> (part // 4)) & 1) == 1:
                within = part * PART + tl.arange(0, PART)
                mask = within < owned
                row = (within - offset) // num_classes
                column = within - offset - row * num_classes
                label = tl.load(label_ptr + first + row, mask=mask, other=0).to(tl.int64)
                others += _any_block(
                    x_ptr, dx_ptr, label, start + within, column, mask, factor,
                    ALPHA, GAMMA, IGNORE_INDEX, PTX,
                )  # fmt: skip
    _finish(negatives, others, factor, out_ptr, counter_ptr, ALPHA)


@triton.jit
def focal_columns_kernel(
    x_ptr,  # [outer, C, inner]
    label_ptr,  # [outer, inner] any integer
    divisor_ptr,
    dx_ptr,
    out_ptr,
    counter_ptr,
    inner,
    num_classes,
    scale,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows are neighbours, as in an NCHW head. A program owns BLOCK of them, and up to 31
    classes; the grid's second dimension goes over the classes."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(inner, BLOCK)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks) * BLOCK
    i = begin + tl.arange(0, BLOCK)
    size = tl.cdiv(num_classes, tl.num_programs(1))
    first = tl.program_id(1) * size
    owned = tl.maximum(tl.minimum(num_classes - first, size), 0)
    label_ptr += outer * inner
    label = tl.load(label_ptr + i, mask=i < inner, other=IGNORE_INDEX).to(tl.int64)
    class_of = label - first

    # One bit for each class that is some row's; all, where rows are ignored or missing.
    known = (class_of >= 0) & (class_of < owned)
    bits = tl.where(known, 1 << tl.where(known, class_of, 0).to(tl.int32), 0)
    bits = tl.where(label == IGNORE_INDEX, 0x7FFFFFFF, bits)
    special = tl.reduce_or(bits, axis=0)

    factor = _factor(divisor_ptr, scale, ACC)
    step = inner.to(tl.int64)
    at = (outer * num_classes + first) * step
    negatives = tl.zeros((BLOCK,), ACC)
    for k in range(owned):
        if ((special >> k) & 1) == 0:
            negatives = _negative_block(
                x_ptr, dx_ptr, at + k * step + i, negatives, factor, ALPHA, GAMMA, PTX
            )
    PART: tl.constexpr = BLOCK // 4
    others = tl.zeros((PART,), ACC)
    if special != 0:
        for part in range(4 * owned):
            k = part // 4
            if ((special >> k) & 1) == 1:
                j = begin + part % 4 * PART + tl.arange(0, PART)
                mask = j < inner
                row_label = tl.load(label_ptr + j, mask=mask, other=0).to(tl.int64)
                others += _any_block(
                    x_ptr, dx_ptr, row_label, at + k * step + j, first + k, mask, factor,
                    ALPHA, GAMMA, IGNORE_INDEX, PTX,
                )  # fmt: skip
    _finish(negatives, others, factor, out_ptr, counter_ptr, ALPHA)
