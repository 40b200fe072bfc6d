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
def to_fp32(x, PTX: tl.constexpr):
    """The same numbers in fp32; bf16 in one instruction each, where the compiler takes 1.5."""
    if PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def reciprocal(u, PTX: tl.constexpr):
    """1 / u for u in [1, inf], to 2 ulp; 0 where it would be subnormal."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        r = tl.rsqrt(u)
        return r * r


@triton.jit
def minus_log_of_rest(s, HALF: tl.constexpr):
    """-log(1 - s) for s in [0, 1/2]: s times a polynomial, minimax in relative error.

    To 2.3e-8, or with HALF, for what is not more exact itself, to 6.5e-6.
    """
    if HALF:
        log = s * 0.846379855 - 0.311093851
        log = log * s + 0.403362791
        log = log * s + 0.313671104
        log = log * s + 0.500895448
        return (log * s + 0.999993509) * s
    else:
        log = s * 1.44110795 - 1.69581205
        log = log * s + 1.25766986
        log = log * s - 0.203538987
        log = log * s + 0.269612764
        log = log * s + 0.242805077
        log = log * s + 0.333700615
        log = log * s + 0.499992853
        return (log * s + 1.0) * s


@triton.jit
def sigmoid_pair(x):
    """p = sigmoid(x), q = 1 - p and log(1 + exp(-|x|)), each to full relative precision."""
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
        big = 1 / (1 + e)
        small = e * big
        log = log1p_exp(e)
    else:
        e = tl.exp2(tl.abs(x) * -1.4426950408889634)
        big = reciprocal(1 + e, PTX=False)
        small = e * big
        log = minus_log_of_rest(small, HALF=False)
    positive = x >= 0
    return tl.where(positive, big, small), tl.where(positive, small, big), log


@triton.jit
def logistic(x, PTX: tl.constexpr):
    """p = sigmoid(x), q = 1 - p and log(1 + exp(x)) of loaded logits, in fp32 or fp64.

    In fp32 two special functions: the logarithm is that of 1 - s, s = min(p, q) in [0, 1/2], a
    polynomial. Relative errors: of p 1e-6, of the logarithm what the polynomial leaves; of q for
    x > 0 it is absolute. At -inf: 0, 1 and 0.
    """
    if x.dtype == tl.float64:
        p, q, softplus = sigmoid_pair(x)
        return p, q, tl.maximum(x, 0.0) + softplus
    else:
        v = to_fp32(x, PTX)
        p = reciprocal(1 + tl.exp2(v * -1.4426950408889634), PTX)
        q = 1 - p
        s = tl.minimum(p, q)
        HALF: tl.constexpr = x.dtype != tl.float32
        return p, q, minus_log_of_rest(s, HALF) + tl.maximum(v, 0.0)


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
    """IEEE division, slow on NVIDIA where a is 0. Triton's fp32 `/` is only accurate to 2 ulp."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def div_rn_sparse(a, b):
    """IEEE division of numbers most of which are 0, as overlaps are."""
    if a.dtype == tl.float64:
        return a / b
    else:
        # In place of 0 what divides fast, and has a finite quotient: 2^-40.
        quotient = tl.math.div_rn(tl.where(a == 0, 9.094947017729282e-13, a), b)
        return tl.where(a == 0, a * quotient, quotient)


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


@triton.jit
def _atan_over_z(u, FULL: tl.constexpr):
    """atan(z) / z for u = z^2: polynomials, minimax in relative error.

    To 1.5e-8 for z in [0, 1], or with FULL to 4e-20 for z in [0, tan(pi / 8)].
    """
    if FULL:
        p = u * 0.015139900474298892 - 0.033414765022334668
        p = p * u + 0.045007158478597488
        p = p * u - 0.052176274593601021
        p = p * u + 0.058768857597319025
        p = p * u - 0.066662108795586255
        p = p * u + 0.076922815070618688
        p = p * u - 0.090909080784518813
        p = p * u + 0.11111111085909563
        p = p * u - 0.14285714285340197
        p = p * u + 0.19999999999997111
        p = p * u - 0.33333333333333325
        return p * u + 1.0
    else:
        p = u * 0.00284994016 - 0.0160688323
        p = p * u + 0.0426918457
        p = p * u - 0.0750432111
        p = p * u + 0.106409455
        p = p * u - 0.14203647
        p = p * u + 0.199926196
        p = p * u - 0.333330734
        return p * u + 1.0


@triton.jit
def atan_ratio(a, b):
    """atan(a / b), and 0 for 0 / 0, to 2.5e-7 (fp64: 5e-16) relative; in [-pi/2, pi/2]."""
    low, high = nan_min(tl.abs(a), tl.abs(b)), nan_max(tl.abs(a), tl.abs(b))
    z = tl.where(high == 0, high, div_rn(low, high))
    if a.dtype == tl.float64:
        # Past tan(pi / 8): atan(z) = pi/4 + atan((z - 1) / (z + 1)).
        past = z > 0.41421356237309503
        y = tl.where(past, (z - 1) / (z + 1), z)
        angle = y * _atan_over_z(y * y, FULL=True)
        angle = tl.where(past, angle + 0.7853981633974483, angle)
    else:
        angle = z * _atan_over_z(z * z, FULL=False)
    angle = tl.where(tl.abs(a) > tl.abs(b), 1.5707963267948966 - angle, angle)
    return tl.where((a < 0) != (b < 0), -angle, angle)
