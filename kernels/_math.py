"""Device mathematics shared by kernels. No loads, no stores."""

import triton
import triton.language as tl

# Smallest normal numbers. What lies below counts as zero, since hardware may flush subnormals in
# one instruction and not in the next, and turn a guarded quotient into 0 / 0.
_TINY_32 = tl.constexpr(1.1754943508222875e-38)
_TINY_64 = tl.constexpr(2.2250738585072014e-308)


@triton.jit
def log1p_exp(e):
    """log(1 + e) for e in [0, 1], to full relative precision (Kahan): 1 + e alone loses small e."""
    u = 1 + e
    return tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))


@triton.jit
def sigmoid_pair(x):
    """p = sigmoid(x), q = 1 - p and log(1 + exp(-|x|)), each to full relative precision."""
    e = tl.exp(-tl.abs(x))
    big = 1 / (1 + e)
    small = e * big
    positive = x >= 0
    return tl.where(positive, big, small), tl.where(positive, small, big), log1p_exp(e)


@triton.jit
def power(u, EXPONENT: tl.constexpr):
    """u ** EXPONENT for u in [0, 1] and EXPONENT >= 0, with 0 ** 0 = 1."""
    if EXPONENT == 0:
        return u * 0 + 1
    elif EXPONENT == 1:
        return u
    elif EXPONENT == 2:
        return u * u
    else:
        TINY: tl.constexpr = _TINY_64 if u.dtype == tl.float64 else _TINY_32
        return tl.where(u < TINY, 0.0, tl.exp(EXPONENT * tl.log(tl.maximum(u, TINY))))


@triton.jit
def guarded_ratio(a, b):
    """a / b for b >= 0, and 0 where b underflows."""
    TINY: tl.constexpr = _TINY_64 if b.dtype == tl.float64 else _TINY_32
    return tl.where(b < TINY, 0.0, a / tl.maximum(b, TINY))


@triton.jit
def div_rn(a, b):
    """IEEE division. Triton's own fp32 `/` is only accurate to 2 ulp."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def box_area(x1, y1, x2, y2, OFFSET: tl.constexpr):
    if OFFSET == 0:
        return (x2 - x1) * (y2 - y1)
    else:
        return (x2 - x1 + OFFSET) * (y2 - y1 + OFFSET)


@triton.jit
def nan_min(a, b):
    """min that keeps a NaN, as numpy's and torch's do; the default drops it."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def box_overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, OFFSET: tl.constexpr):
    """Signed width and height of the intersection; negative where the boxes are apart."""
    w = nan_min(ax2, bx2) - nan_max(ax1, bx1)
    h = nan_min(ay2, by2) - nan_max(ay1, by1)
    if OFFSET == 0:
        return w, h
    else:
        return w + OFFSET, h + OFFSET
