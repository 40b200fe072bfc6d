"""Softmax focal loss, and cross-entropy, of a label y among C classes.

With p = softmax(x), q = 1 - p_y, class weights w, smoothing s and a row's factor a:

    CE     = (1 - s) w_y (-log p_y) + s / C  sum_j w_j (-log p_j)
    L      = a q^gamma CE
    dL/dx  = a q^gamma [((1 - s) w_y + gamma p_y CE / q) (p - y) + s / C (sum_j w_j p - w)]

where y stands for the label's one-hot vector. q is the sum of the other classes' shares and not
1 - p_y, and -log p_y = -log(1 - q) where p_y is the larger, so a certain answer keeps its relative
precision. gamma = 0 is cross-entropy.

Bytes per logit of s bytes: s, with the gradient 2 s, and 8 per row for the label; beyond a few
thousand classes the gradient needs a second reading, which a cache may serve. One exp per logit.
Rows are taken several at a time, their classes in one tile of BLOCK and one of REST columns, since
tiles are powers of 2: 80 is 64 + 16.
"""

import triton
import triton.language as tl

from ._loss import sum_over_programs
from ._math import guarded_ratio, log1p_exp, minus_log_of_rest, power

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp of x <= 0, fp32 or fp64."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * _LOG2_E)


@triton.jit
def _finite(m):
    """A row's maximum, or 0 where all its logits are -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _tile(x_ptr, row, column, rows, num_classes, row_step, class_step):
    """Logits of some rows, in fp32 or fp64, -inf elsewhere; and where they are."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    mask = rows[:, None] & (column < num_classes)[None, :]
    at = row[:, None] * row_step + column[None, :] * class_step
    return tl.load(x_ptr + at, mask=mask, other=float("-inf")).to(ACC), at


@triton.jit
def _others(x, m, column, label):
    """exp(x - m), and its sum over a tile without the label's."""
    e = _exp(x - m[:, None])
    return e, tl.sum(tl.where(column[None, :] == label[:, None], 0.0, e), axis=1)


@triton.jit
def _weights(table_ptr, column, num_classes, ACC: tl.constexpr):
    """The cross-entropy's weights of some classes; 0 beyond the last."""
    w = (column < num_classes).to(ACC)
    if table_ptr is not None:
        w = tl.load(table_ptr + num_classes + column, mask=column < num_classes, other=0).to(ACC)
    return w


@triton.jit
def _distances(x, reference, w):
    """Each row's sum of w (reference - x) over a tile; a weight of 0 hides a logit of -inf."""
    return tl.sum(tl.where((w != 0)[None, :], w[None, :] * (reference[:, None] - x), 0.0), axis=1)


@triton.jit
def _row_terms(
    x_label, m, others, total_weight, distance, label, valid, row,
    table_ptr, row_weight_ptr, num_classes,
    GAMMA: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Per row: the loss, 1 / sum(exp), q, and what (p - y) and (sum_j w_j p - w) are weighed with.

    ``distance`` is sum_j w_j (m - x_j).
    """
    mine = _exp(x_label - m)
    total = mine + others
    share = 1 / total
    p, q = mine * share, others * share
    if m.dtype == tl.float64:
        near = log1p_exp(tl.where(p >= 0.5, others / mine, 0.0))
    else:
        near = minus_log_of_rest(tl.minimum(q, 0.5), HALF=False)
    nll = tl.where(p >= 0.5, near, (m - x_label) + tl.log(total))
    factor = tl.full(label.shape, 1.0, m.dtype)
    weight = factor
    if row_weight_ptr is not None:
        factor = tl.load(row_weight_ptr + row, mask=valid, other=0).to(m.dtype)
    if table_ptr is not None:
        factor *= tl.load(table_ptr + label, mask=valid, other=0).to(m.dtype)
        weight = tl.load(table_ptr + num_classes + label, mask=valid, other=0).to(m.dtype)
    entropy = weight * nll
    each = tl.full((), SMOOTHING, m.dtype) / num_classes
    if SMOOTHING != 0:
        spread = distance + total_weight * tl.log(total)
        entropy = (1 - SMOOTHING) * entropy + each * spread
    focus = power(q, GAMMA)
    towards = (1 - SMOOTHING) * weight
    if GAMMA != 0:
        towards += GAMMA * p * guarded_ratio(entropy, q)
    focus *= factor
    return focus * entropy, share, q, focus * towards, focus * each


@triton.jit
def _store_gradient(
    dx_ptr, e, at, column, label, valid, rows, share, q, towards, spread, w, total_weight,
    num_classes, SMOOTHING: tl.constexpr,
):  # fmt: skip
    p = e * share[:, None]
    dx = towards[:, None] * tl.where(column[None, :] == label[:, None], -q[:, None], p)
    if SMOOTHING != 0:
        dx += spread[:, None] * (total_weight * p - w[None, :])
    dx = tl.where(valid[:, None], dx, 0.0)
    mask = rows[:, None] & (column < num_classes)[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale(factor_ptr, counter_ptr, row, valid, ACC: tl.constexpr):
    """What a row's gradient is multiplied by, and a sum."""
    if factor_ptr is None:
        return 1.0
    elif counter_ptr is None:
        return tl.load(factor_ptr + row, mask=valid, other=0).to(ACC)
    else:
        return 1 / tl.load(factor_ptr).to(ACC)


@triton.jit
def _finish(loss, valid, rows, at, scale, out_ptr, counter_ptr):
    """Write each row's loss, or their sum."""
    loss = tl.where(valid, loss, 0.0)
    if counter_ptr is not None:
        total, last = sum_over_programs(tl.sum(loss, axis=0), out_ptr + 1, counter_ptr)
        if last:
            tl.store(out_ptr, total * scale)
    elif out_ptr is not None:
        tl.store(out_ptr + at, loss.to(out_ptr.dtype.element_ty), mask=rows)


@triton.jit
def _rows_of_program(num_rows, num_classes, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Where a program's rows begin, in logits and in labels, how many there are, and the steps from
    row to row and from class to class. Contiguous rows are counted in 32 bits."""
    if COLUMNS:
        tiles = tl.cdiv(num_rows, ROWS)
        outer = (tl.program_id(0) // tiles).to(tl.int64)
        begin = tl.program_id(0) % tiles * ROWS
        step = num_rows.to(tl.int64)
        start = outer * step
        return start * num_classes + begin, start + begin, num_rows - begin, 1, step
    else:
        begin = tl.program_id(0).to(tl.int64) * ROWS
        return begin * num_classes, begin, num_rows - begin, num_classes, 1


@triton.jit
def _label_of(label_ptr, row, rows, num_classes, IGNORE_INDEX: tl.constexpr):
    """A class for every row, and whether the row counts."""
    label = tl.load(label_ptr + row, mask=rows, other=IGNORE_INDEX).to(tl.int64)
    valid = rows & (label >= 0) & (label < num_classes) & (label != IGNORE_INDEX)
    return tl.where(valid, label, 0).to(tl.int32), valid


@triton.jit
def softmax_focal_kernel(
    x_ptr,  # [N, C]; COLUMNS: [outer, C, inner]
    label_ptr,  # [N]; COLUMNS: [outer, inner]
    table_ptr,  # None, or [2, C] fp32 | fp64: alpha, and the weights of the cross-entropy
    row_weight_ptr,  # None, or as label_ptr
    factor_ptr,  # None; a sum's divisor [1]; or, without a counter, the gradient of each row's loss
    dx_ptr,  # None, or as x_ptr
    out_ptr,  # with a counter [1 + programs]: the loss, and scratch; else None, or as label_ptr
    counter_ptr,  # None: no sum
    num_rows,  # N; COLUMNS: inner
    num_classes,
    GAMMA: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,  # 0: none
):
    """A program owns some rows, whole: tiles of BLOCK and REST classes stay in registers."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = 4096 // BLOCK
    start, first, left, row_step, class_step = _rows_of_program(
        num_rows, num_classes, COLUMNS, ROWS
    )
    x_ptr += start
    row = tl.arange(0, ROWS)
    rows = row < left
    label, valid = _label_of(label_ptr + first, row, rows, num_classes, IGNORE_INDEX)
    column = tl.arange(0, BLOCK)
    x, at = _tile(x_ptr, row, column, valid, num_classes, row_step, class_step)
    m = tl.max(x, axis=1)
    if REST != 0:
        column_2 = BLOCK + tl.arange(0, REST)
        x_2, at_2 = _tile(x_ptr, row, column_2, valid, num_classes, row_step, class_step)
        m = tl.maximum(m, tl.max(x_2, axis=1))
    m = _finite(m)
    e, others = _others(x, m, column, label)
    w = _weights(table_ptr, column, num_classes, ACC)
    total_weight = tl.sum(w, axis=0)
    distance = _distances(x, m, w)
    w_2 = w
    if REST != 0:
        e_2, others_2 = _others(x_2, m, column_2, label)
        others += others_2
        w_2 = _weights(table_ptr, column_2, num_classes, ACC)
        total_weight += tl.sum(w_2, axis=0)
        distance += _distances(x_2, m, w_2)
    x_label = tl.load(x_ptr + row * row_step + label * class_step, mask=valid, other=0).to(ACC)
    loss, share, q, towards, spread = _row_terms(
        x_label, m, others, total_weight, distance, label, valid, first + row,
        table_ptr, row_weight_ptr, num_classes, GAMMA, SMOOTHING,
    )  # fmt: skip
    scale = _scale(factor_ptr, counter_ptr, first + row, valid, ACC)
    if dx_ptr is not None:
        towards *= scale
        spread *= scale
        _store_gradient(
            dx_ptr + start, e, at, column, label, valid, rows, share, q, towards, spread, w,
            total_weight, num_classes, SMOOTHING,
        )  # fmt: skip
        if REST != 0:
            _store_gradient(
                dx_ptr + start, e_2, at_2, column_2, label, valid, rows, share, q, towards, spread,
                w_2, total_weight, num_classes, SMOOTHING,
            )  # fmt: skip
    _finish(loss, valid, rows, first + row, scale, out_ptr, counter_ptr)


@triton.jit
def softmax_focal_long_kernel(
    x_ptr, label_ptr, table_ptr, row_weight_ptr, factor_ptr, dx_ptr, out_ptr, counter_ptr,
    num_rows, num_classes,
    GAMMA: tl.constexpr, IGNORE_INDEX: tl.constexpr, SMOOTHING: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same for more classes than fit: BLOCK at a time, in one sweep; with a gradient in two."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    start, first, left, row_step, class_step = _rows_of_program(
        num_rows, num_classes, COLUMNS, ROWS
    )
    x_ptr += start
    row = tl.arange(0, ROWS)
    rows = row < left
    label, valid = _label_of(label_ptr + first, row, rows, num_classes, IGNORE_INDEX)
    x_label = tl.load(x_ptr + row * row_step + label * class_step, mask=valid, other=0).to(ACC)
    m = tl.full((ROWS,), float("-inf"), ACC)
    others = tl.zeros((ROWS,), ACC)
    distance = tl.zeros((ROWS,), ACC)
    total_weight = tl.sum(tl.zeros((BLOCK,), ACC), axis=0)
    for begin in range(0, num_classes, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x, _ = _tile(x_ptr, row, column, valid, num_classes, row_step, class_step)
        higher = tl.maximum(m, tl.max(x, axis=1))
        _, more = _others(x, _finite(higher), column, label)
        others = others * _exp(m - _finite(higher)) + more
        m = higher
        if SMOOTHING != 0:
            w = _weights(table_ptr, column, num_classes, ACC)
            total_weight += tl.sum(w, axis=0)
            distance += _distances(x, x_label, w)
    m = _finite(m)
    distance += total_weight * (m - x_label)
    loss, share, q, towards, spread = _row_terms(
        x_label, m, others, total_weight, distance, label, valid, first + row,
        table_ptr, row_weight_ptr, num_classes, GAMMA, SMOOTHING,
    )  # fmt: skip
    scale = _scale(factor_ptr, counter_ptr, first + row, valid, ACC)
    if dx_ptr is not None:
        towards *= scale
        spread *= scale
        for begin in range(0, num_classes, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            x, at = _tile(x_ptr, row, column, valid, num_classes, row_step, class_step)
            w = _weights(table_ptr, column, num_classes, ACC)
            _store_gradient(
                dx_ptr + start, _exp(x - m[:, None]), at, column, label, valid, rows, share, q,
                towards, spread, w, total_weight, num_classes, SMOOTHING,
            )  # fmt: skip
    _finish(loss, valid, rows, first + row, scale, out_ptr, counter_ptr)
