"""Sigmoid focal loss (Lin et al., 2017), elementwise, for hard and soft targets.

With p = sigmoid(x), q = 1 - p and a target t in [0, 1]:

    u     = p (1 - t) + q t                         = 1 - p_t
    B     = |x| (1 - t if x >= 0 else t) + log(1 + exp(-|x|))     binary cross-entropy with logits
    L     = alpha_t u^gamma B,                      alpha_t = alpha t + (1 - alpha) (1 - t)
    dL/dx = alpha_t u^gamma [p (1 - t) - q t + gamma (1 - 2 t) (p q / u) B]

p, q and B come from one exp(-|x|), and u and B are sums of terms of one sign, so nothing
overflows or cancels however large x is, and gamma = 0 is plain cross-entropy. p q / u is at most
1; it is taken as 0 once u underflows, where u^gamma is already 0.

Bytes per element of s bytes: forward "none" 2 s, reduced s; backward 2 s (3 s for "none"); an
integer label costs 8 bytes per row of classes, a dense target its own size per element.
Instructions per element on sm_90, bf16, integer labels: 108 forward, 127 backward.
"""

import triton
import triton.language as tl

from ._math import guarded_ratio, nan_max, nan_min, power, sigmoid_pair

# How the targets and the weights are laid out: one per element, or one per row of classes.
NONE = tl.constexpr(0)
PER_ROW = tl.constexpr(1)
PER_ELEMENT = tl.constexpr(2)


@triton.jit
def _target_and_weight(
    target_ptr,  # PER_ROW: [N] any integer; PER_ELEMENT: [N, C] float or bool
    weight_ptr,  # NONE: None; PER_ROW: [N]; PER_ELEMENT: [N, C]
    base,
    local,
    mask,
    num_classes,
    IGNORE_INDEX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TARGETS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Target in [0, 1], weight, and which elements count, for elements base + local."""
    # One 64-bit division per program; the per-element division stays in 32 bits.
    first_row = base // num_classes
    within = (base - first_row * num_classes).to(tl.int32) + local
    row = first_row + within // num_classes
    counts = mask
    if TARGETS == PER_ROW:
        label = tl.load(target_ptr + row, mask=mask, other=0).to(tl.int64)
        t = tl.where(label == within % num_classes, 1.0, 0.0).to(ACC)
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
    x_ptr,  # [N, C] fp16 | bf16 | fp32 | fp64
    target_ptr,
    weight_ptr,
    out_ptr,  # REDUCE: [programs] ACC, else [N, C]
    n,  # N * C
    num_classes,
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
        target_ptr, weight_ptr, base, local, mask, num_classes,
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
    x_ptr,  # [N, C]
    target_ptr,
    weight_ptr,
    grad_ptr,  # SCALAR_GRAD: [1], else [N, C]; gradient of the loss
    dx_ptr,  # [N, C]
    n,
    num_classes,
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
        target_ptr, weight_ptr, base, local, mask, num_classes,
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
