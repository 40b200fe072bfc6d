"""GHM-C and GHM-R, the gradient harmonizing mechanism (Li et al., 2019), in two passes.

    GHM-C: L = max(x, 0) - x t + log(1 + exp(-|x|)),  dL/dx = sigmoid(x) - t
    GHM-R: L = sqrt(d^2 + mu^2) - mu,                 dL/dd = d / sqrt(d^2 + mu^2)

with d = pred - target. g is the size of that derivative, and bin i holds the elements with
e_i <= g < e_{i+1}. The weight of an element is total / (elements of its bin * bins that are not
empty), and a constant of the gradient.

Pass 1 counts without computing g, which is monotonic: g >= e_i exactly where a key reaches a
threshold, found on the host. The key is x for t = 0, -x for t = 1, |d| for GHM-R; for other
targets it is g itself, computed here, and the threshold e_i. Few blocks hold elements of high
bins, so thresholds above a block's largest key cost nothing. The last program makes the weights of
the counts, which are integers and added by atomics, and writes them and the thresholds to a table.

Pass 2 guesses the nearest edge from g, decides by that edge's threshold between the bins on its
two sides, and looks up the weight. In terms of the key y a hard target has L = log(1 + exp(y)) and
dL/dy = sigmoid(y).

The table [3 SLOTS + 1]: weights, the last of them twice; thresholds, after -inf and before inf;
edges, for keys that are g; the total.

Bytes per element of s bytes: pass 1 s, pass 2 s, with the gradient 2 s; a label costs 8 bytes per
row and pass, a dense target or weight its own size.
"""

import triton
import triton.language as tl

from ._ghm import add_counts, hand_over, write_table
from ._loss import sum_over_programs
from ._math import logistic, nan_max, sigmoid_pair, to_fp32

# How the targets and the weights are laid out: one per element, or one per row of classes.
NONE = tl.constexpr(0)
PER_ROW = tl.constexpr(1)
PER_ELEMENT = tl.constexpr(2)


@triton.jit
def _wide(x, PTX: tl.constexpr):
    if x.dtype == tl.float64:
        return x
    else:
        return to_fp32(x, PTX)


@triton.jit
def _number(weight):
    """A label weight of any dtype, in one that holds it."""
    return weight if weight.dtype == tl.float64 else weight.to(tl.float32)


@triton.jit
def ghm_table_kernel(
    table_ptr,
    totals_ptr,  # [SLOTS] fp64: counts of all ranks, after those of the bins the total
    acc_ptr,
    steps_ptr,
    THRESHOLDS: tl.constexpr,
    EDGES: tl.constexpr,
    RULE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program."""
    slot = tl.arange(0, SLOTS)
    count = tl.load(totals_ptr + slot)
    total = tl.load(totals_ptr + len(THRESHOLDS) + 1)
    write_table(count, total, table_ptr, acc_ptr, steps_ptr, THRESHOLDS, EDGES, RULE[0], RULE[1])


# ---- elements of any layout


@triton.jit
def _load(
    x_ptr, target_ptr, weight_ptr, base, local, mask, num_classes, inner, KIND: tl.constexpr
):  # fmt: skip
    """Prediction, target and label weight, if there are weights, of elements base + local."""
    TARGETS: tl.constexpr = KIND[2]
    WEIGHTS: tl.constexpr = KIND[3]
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = _wide(tl.load(x_ptr + base + local, mask=mask, other=0), KIND[4])
    row = base + local
    if TARGETS == PER_ROW or WEIGHTS == PER_ROW:
        # One 64-bit division per program; the per-element ones stay in 32 bits.
        plane = num_classes * inner
        first = base // plane
        within = (base - first * plane).to(tl.int32) + local
        if inner == 1:
            row = first + within // num_classes
            column = within % num_classes
        else:
            row = (first + within // plane) * inner + within % inner
            column = within // inner % num_classes
    if TARGETS == PER_ROW:
        label = tl.load(target_ptr + row, mask=mask, other=-1).to(tl.int64)
        t = tl.where(label == column, 1.0, 0.0).to(ACC)
    else:
        t = tl.load(target_ptr + base + local, mask=mask, other=0).to(ACC)
    if WEIGHTS == PER_ROW:
        weight = _number(tl.load(weight_ptr + row, mask=mask, other=0))
    elif WEIGHTS == PER_ELEMENT:
        weight = _number(tl.load(weight_ptr + base + local, mask=mask, other=0))
    else:
        weight = t  # not used
    return x, t, weight


@triton.jit
def _element(x, t, KIND: tl.constexpr):
    """Key, whether it is g (where KIND says that it may be), g, loss and slope."""
    MU: tl.constexpr = KIND[0]
    if MU is not None:
        mu = tl.full((), MU, x.dtype)  # minimum and maximum take a number as fp32
        d = x - t
        a = tl.abs(d)
        # sqrt(d^2 + mu^2) that does not overflow before its result does.
        larger = nan_max(a, mu)
        ratio = tl.minimum(a, mu) / larger
        root = larger * tl.sqrt(1 + ratio * ratio)
        slope = d / root
        key = tl.where(a == float("inf"), float("nan"), a)  # as g is
        return key, a != a, tl.abs(slope), a * (a / (root + mu)), slope
    elif KIND[2] == PER_ROW:
        y = tl.where(t == 1, -x, x)
        p, _, loss = logistic(y, KIND[4])
        return y, t != t, p, loss, tl.where(t == 1, -p, p)
    else:
        y = tl.where(t == 1, -x, x)
        p, _, softplus = sigmoid_pair(y)
        soft = (t != 0) & (t != 1)
        g = tl.where(soft, tl.abs(p - t), p)
        # Of one sign each; y = x for a soft target.
        bce = tl.abs(y) * tl.where(y >= 0, 1 - t, t) + softplus
        loss = tl.where(soft, bce, tl.maximum(y, 0.0) + softplus)
        slope = tl.where(soft, p - t, tl.where(t == 1, -p, p))
        return tl.where(soft, g, y), soft, g, loss, slope


@triton.jit
def _weight_of(g, key, soft, table_ptr, BINS: tl.constexpr, SLOTS: tl.constexpr):
    """The weight of an element's bin."""
    # The nearest edge, from the last bits of a number so large that they are its integer part;
    # of NaN some edge.
    if g.dtype == tl.float64:
        near = (g * BINS + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int32)
    else:
        near = (g * BINS + 12582912.0).to(tl.int32, bitcast=True)
    near &= SLOTS - 1
    at = near + SLOTS
    if soft is not None:
        at = tl.where(soft, at + SLOTS, at)
    edge = tl.load(table_ptr + at)
    i = tl.where(key >= edge, near, near - 1)
    weight = tl.load(table_ptr + (i & (SLOTS - 1)))
    if soft is not None:
        outside = soft & (key >= tl.load(table_ptr + 2 * SLOTS + BINS))
        weight = tl.where(outside, 0.0, weight)
    return weight


@triton.jit
def ghm_count_kernel(
    x_ptr,  # [outer, C, inner]
    target_ptr,  # PER_ROW: [outer, inner] any integer; PER_ELEMENT: as x_ptr
    weight_ptr,  # NONE: None; PER_ROW: [outer, inner]; PER_ELEMENT: as x_ptr
    table_ptr,  # the table, and [programs] scratch behind it; RULE None: [SLOTS] fp64, and scratch
    acc_ptr,  # None, or [bins]
    steps_ptr,  # None, or [bins]
    tally_ptr,  # [SLOTS + 1] int64, 0
    n,
    num_classes,
    inner,
    KIND: tl.constexpr,  # (mu or None, bins, layouts of targets and weights, PTX, SLOTS, soft)
    THRESHOLDS: tl.constexpr,
    EDGES: tl.constexpr,
    RULE: tl.constexpr,  # (momentum, update); None: totals only
    BLOCK: tl.constexpr,
):
    """Any layout. One program owns BLOCK consecutive elements."""
    SLOTS: tl.constexpr = KIND[5]
    base = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    mask = local < tl.minimum(n - base, BLOCK).to(tl.int32)
    x, t, weight = _load(
        x_ptr, target_ptr, weight_ptr, base, local, mask, num_classes, inner, KIND
    )  # fmt: skip
    key, soft, g, _, _ = _element(x, t, KIND)
    valid = mask
    share = None
    if weight_ptr is not None:
        valid = mask & (weight > 0)
        if KIND[0] is not None:
            share = tl.sum(weight.to(x.dtype), axis=0)
    bins = valid
    if KIND[6]:
        bins = valid & ~(soft & (g >= EDGES[len(EDGES) - 1]))
    slot = tl.arange(0, SLOTS)
    counts = tl.where(slot == KIND[1], tl.sum(valid.to(tl.int32), axis=0), 0)
    key = tl.where(bins, key, float("nan"))
    counts = add_counts(counts, key, soft if KIND[6] else None, THRESHOLDS, EDGES)
    hand_over(
        counts, share, table_ptr, acc_ptr, steps_ptr, tally_ptr, THRESHOLDS, EDGES, RULE
    )  # fmt: skip


@triton.jit
def _factor(divisor_ptr, scale, ACC: tl.constexpr):
    """What the loss and its gradient are multiplied by."""
    factor = tl.cast(scale, ACC)  # in the interpreter it is a Python number
    if divisor_ptr is not None:
        factor /= tl.load(divisor_ptr).to(ACC)
    return factor


@triton.jit
def ghm_loss_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    table_ptr,
    divisor_ptr,  # None, or [1]
    dx_ptr,  # None, or as x_ptr: the gradient of the reduced loss
    out_ptr,  # REDUCE: [1 + programs] ACC, the loss and scratch; else as x_ptr
    counter_ptr,  # [1] int32, 0
    n,
    num_classes,
    inner,
    scale,
    KIND: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any layout. One program owns BLOCK consecutive elements."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    base = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    mask = local < tl.minimum(n - base, BLOCK).to(tl.int32)
    x, t, weight = _load(
        x_ptr, target_ptr, weight_ptr, base, local, mask, num_classes, inner, KIND
    )  # fmt: skip
    key, soft, g, loss, slope = _element(x, t, KIND)
    SLOTS: tl.constexpr = KIND[5]
    w = _weight_of(tl.minimum(g, 1.0), key, soft if KIND[6] else None, table_ptr, KIND[1], SLOTS)
    valid = mask
    if weight_ptr is not None:
        valid = mask & (weight > 0)
    factor = _factor(divisor_ptr, scale, ACC)
    # Selects, not products: what does not count may hold NaN, and the factor may be infinite.
    if dx_ptr is not None:
        dx = tl.where(valid, slope * (w * factor), 0.0)
        tl.store(dx_ptr + base + local, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    loss = tl.where(valid, w * loss, 0.0)
    if REDUCE:
        total, last = sum_over_programs(tl.sum(loss, axis=0), out_ptr + 1, counter_ptr)
        if last:
            tl.store(out_ptr, total * factor)
    else:
        tl.store(out_ptr + base + local, (loss * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def ghm_bwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    table_ptr,
    grad_ptr,  # SCALAR_GRAD: [1], else as x_ptr; gradient of the elementwise losses
    dx_ptr,
    n,
    num_classes,
    inner,
    scale_ptr,  # None, or [1]: a divisor
    scale,
    KIND: tl.constexpr,
    SCALAR_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any layout. One program owns BLOCK consecutive elements."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    base = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    mask = local < tl.minimum(n - base, BLOCK).to(tl.int32)
    x, t, weight = _load(
        x_ptr, target_ptr, weight_ptr, base, local, mask, num_classes, inner, KIND
    )  # fmt: skip
    key, soft, g, _, slope = _element(x, t, KIND)
    SLOTS: tl.constexpr = KIND[5]
    w = _weight_of(tl.minimum(g, 1.0), key, soft if KIND[6] else None, table_ptr, KIND[1], SLOTS)
    valid = mask
    if weight_ptr is not None:
        valid = mask & (weight > 0)
    if SCALAR_GRAD:
        grad = tl.load(grad_ptr).to(ACC)
    else:
        grad = tl.load(grad_ptr + base + local, mask=mask, other=0).to(ACC)
    dx = tl.where(valid, slope * (w * _factor(scale_ptr, scale, ACC)) * grad, 0.0)
    tl.store(dx_ptr + base + local, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- rows of labels


@triton.jit
def _share(label_ptr, weight_ptr, n, num_classes, BLOCK: tl.constexpr):
    """What this program owns, up to 31 blocks: the first element, how many, and a bit for each
    block with a positive, a row that does not count or an end."""
    ROWS: tl.constexpr = 128
    size = tl.cdiv(tl.cdiv(n, BLOCK), tl.num_programs(0)) * BLOCK
    start = tl.program_id(0).to(tl.int64) * size
    owned = tl.maximum(tl.minimum(n - start, size), 0).to(tl.int32)
    first = start // num_classes
    offset = (first * num_classes - start).to(tl.int32)  # of the first row, at most 0
    bits = tl.zeros((ROWS,), tl.int32)
    for r in range(0, tl.cdiv(owned - offset, num_classes), ROWS):
        row = r + tl.arange(0, ROWS)
        begin = offset + row * num_classes
        mask = begin < owned
        label = tl.load(label_ptr + first + row, mask=mask, other=-1).to(tl.int64)
        # The elements that are not plain negatives: one, or those of a row.
        low = tl.where((label >= 0) & (label < num_classes), begin + label.to(tl.int32), -1)
        high = low
        if weight_ptr is not None:
            weight = _number(tl.load(weight_ptr + first + row, mask=mask, other=1))
            none = (weight > 0) == 0
            low = tl.where(none, tl.maximum(begin, 0), low)
            high = tl.where(none, tl.minimum(begin + num_classes, owned) - 1, high)
        inside = mask & (low >= 0) & (low < owned)
        blocks = (2 << (tl.maximum(high, 0) // BLOCK)) - (1 << (tl.maximum(low, 0) // BLOCK))
        bits |= tl.where(inside, blocks, 0)
    special = tl.reduce_or(bits, axis=0) | ((owned % BLOCK != 0).to(tl.int32) << (owned // BLOCK))
    return start, owned, special


@triton.jit
def _special_block(x_ptr, label_ptr, weight_ptr, start, within, owned, num_classes):
    """Logits of elements start + within, negated where positive, which exist, and which count."""
    mask = within < owned
    first = start // num_classes
    place = within + (start - first * num_classes).to(tl.int32)
    row = place // num_classes
    label = tl.load(label_ptr + first + row, mask=mask, other=-1).to(tl.int64)
    positive = label == place - row * num_classes
    x = tl.load(x_ptr + start + within, mask=mask, other=0)
    valid = mask
    if weight_ptr is not None:
        valid = mask & (_number(tl.load(weight_ptr + first + row, mask=mask, other=0)) > 0)
    return tl.where(positive, -x, x), positive, mask, valid


@triton.jit
def ghm_count_rows_kernel(
    x_ptr,  # [N, C]
    label_ptr,  # [N] any integer
    weight_ptr,  # None, or [N]
    table_ptr,
    acc_ptr,
    steps_ptr,
    tally_ptr,
    n,
    num_classes,
    THRESHOLDS: tl.constexpr,
    EDGES: tl.constexpr,
    RULE: tl.constexpr,
    SLOTS: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The classes of a row are neighbours. A program owns up to 31 blocks of consecutive elements,
    as many as the others."""
    BINS: tl.constexpr = len(THRESHOLDS) + 1
    start, owned, special = _share(label_ptr, weight_ptr, n, num_classes, BLOCK)
    slot = tl.arange(0, SLOTS)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((SLOTS,), tl.int32)
    for k in range(tl.cdiv(owned, BLOCK)):
        if ((special >> k) & 1) == 0:
            key = _wide(tl.load(x_ptr + start + k * BLOCK + lane), PTX)
            counts += tl.where(slot == BINS, BLOCK, 0)
        else:
            y, _, _, valid = _special_block(
                x_ptr, label_ptr, weight_ptr, start, k * BLOCK + lane, owned, num_classes
            )
            key = tl.where(valid, _wide(y, PTX), float("nan"))
            counts += tl.where(slot == BINS, tl.sum(valid.to(tl.int32), axis=0), 0)
        counts = add_counts(counts, key, None, THRESHOLDS, EDGES)
    hand_over(counts, None, table_ptr, acc_ptr, steps_ptr, tally_ptr, THRESHOLDS, EDGES, RULE)


@triton.jit
def _logits(y, table_ptr, BINS: tl.constexpr, SLOTS: tl.constexpr, PTX: tl.constexpr):
    """Weighted loss and slope of logits as negatives."""
    p, _, softplus = logistic(y, PTX)
    w = _weight_of(p, _wide(y, PTX), None, table_ptr, BINS, SLOTS)
    return w * softplus, w, p


@triton.jit
def ghm_loss_rows_kernel(
    x_ptr,  # [N, C]
    label_ptr,  # [N]
    weight_ptr,  # None, or [N]
    table_ptr,
    divisor_ptr,
    dx_ptr,  # None, or [N, C]
    out_ptr,
    counter_ptr,
    n,
    num_classes,
    scale,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As for the counts."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    start, owned, special = _share(label_ptr, weight_ptr, n, num_classes, BLOCK)
    factor = _factor(divisor_ptr, scale, ACC)
    lane = tl.arange(0, BLOCK)
    negatives = tl.zeros((BLOCK,), ACC)
    for k in range(owned // BLOCK):
        if ((special >> k) & 1) == 0:
            at = start + k * BLOCK + lane
            loss, w, p = _logits(tl.load(x_ptr + at), table_ptr, BINS, SLOTS, PTX)
            if dx_ptr is not None:
                dx = p * (w * factor)
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty))
            negatives += loss
    # Smaller blocks, for fewer registers.
    PART: tl.constexpr = BLOCK // 4
    others = tl.zeros((PART,), ACC)
    if special != 0:
        for part in range(tl.cdiv(owned, PART)):
            if ((special >> (part // 4)) & 1) == 1:
                within = part * PART + tl.arange(0, PART)
                y, positive, mask, valid = _special_block(
                    x_ptr, label_ptr, weight_ptr, start, within, owned, num_classes
                )
                loss, w, p = _logits(y, table_ptr, BINS, SLOTS, PTX)
                # Selects, not products: what does not count may hold NaN.
                others += tl.where(valid, loss, 0.0)
                if dx_ptr is not None:
                    dx = tl.where(valid, tl.where(positive, -p, p) * (w * factor), 0.0)
                    tl.store(dx_ptr + start + within, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    share = tl.sum(negatives, axis=0) + tl.sum(others, axis=0)
    total, last = sum_over_programs(share, out_ptr + 1, counter_ptr)
    if last:
        tl.store(out_ptr, total * factor)
