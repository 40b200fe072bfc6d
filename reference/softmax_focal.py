"""Softmax focal loss and its gradient, in float64 and in log space."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class _Rows(NamedTuple):
    """Of every row, with the classes last: what loss and gradient are made of."""

    log_p: Array  # [..., C]
    label: Array  # 0 where the row does not count
    counts: Array
    log_q: Array  # log(1 - p) of the label
    factor: Array  # alpha of the label and the weight of the row
    smooth: Array  # [..., C], what the cross-entropy weighs -log p with


def _log_sum_exp(x: Array) -> Array:
    """Over the last axis, which stays, with length 1; -inf of nothing."""
    highest = x.max(-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(highest), 0, highest)
    return shift + np.log(np.exp(x - shift).sum(-1, keepdims=True))


@np.errstate(all="ignore")
def _rows(
    inputs: Array,
    targets: Array,
    alpha: float | Array | None,
    class_weight: Array | None,
    sample_weight: Array | None,
    ignore_index: int,
    label_smoothing: float,
) -> _Rows:
    x = np.moveaxis(inputs.astype(np.float64), 1, -1)
    classes = x.shape[-1]
    counts = (targets != ignore_index) & (targets >= 0) & (targets < classes)
    label = np.where(counts, targets, 0).astype(np.int64)
    x = np.where(counts[..., None], x, 0)
    highest = x.max(-1, keepdims=True, initial=-np.inf)
    x = x - np.where(np.isneginf(highest), 0, highest)  # far from 0 digits would be lost
    log_p = x - _log_sum_exp(x)
    chosen = label[..., None] == np.arange(classes)
    log_q = _log_sum_exp(np.where(chosen, -np.inf, log_p))
    # What is nearly 1 is known by what is missing.
    log_p = np.where(chosen & (log_q < -1), np.log1p(-np.exp(log_q)), log_p)
    weight = np.ones(classes) if class_weight is None else class_weight.astype(np.float64)
    factor = counts * (np.ones(targets.shape) if sample_weight is None else sample_weight)
    if alpha is not None:
        factor = factor * np.broadcast_to(np.asarray(alpha, np.float64), (classes,))[label]
    smooth = weight * ((1 - label_smoothing) * chosen + label_smoothing / classes)
    return _Rows(log_p, label, counts, log_q[..., 0], np.where(counts, factor, 0), smooth)


@np.errstate(all="ignore")
def _cross_entropy(rows: _Rows) -> Array:
    # Not 0 times infinity, where a class is masked by a logit of -inf.
    return -np.where(rows.smooth == 0, 0, rows.smooth * rows.log_p).sum(-1)


@np.errstate(all="ignore")
def softmax_focal_loss(
    inputs: Array,
    targets: Array,
    alpha: float | Array | None = None,
    gamma: float = 2.0,
    *,
    class_weight: Array | None = None,
    sample_weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """Loss of every row, float64 [N, ...]; arguments as in ``dlops_triton.softmax_focal_loss``,
    whose ``weight`` is either per class or per sample."""
    rows = _rows(inputs, targets, alpha, class_weight, sample_weight, ignore_index, label_smoothing)
    focus = np.exp(gamma * rows.log_q) if gamma else np.ones(rows.log_q.shape)
    return np.where(rows.counts, rows.factor * focus * _cross_entropy(rows), 0)


@np.errstate(all="ignore")
def softmax_focal_loss_grad(
    inputs: Array,
    targets: Array,
    alpha: float | Array | None = None,
    gamma: float = 2.0,
    *,
    class_weight: Array | None = None,
    sample_weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """Derivative of each row's loss by its own logits, float64 [N, C, ...]."""
    rows = _rows(inputs, targets, alpha, class_weight, sample_weight, ignore_index, label_smoothing)
    chosen = rows.label[..., None] == np.arange(rows.log_p.shape[-1])
    p = np.exp(rows.log_p)
    # p - 1 of the label, without cancellation.
    towards = np.where(chosen, -np.exp(rows.log_q)[..., None], p)
    slope = rows.smooth.sum(-1, keepdims=True) * p - rows.smooth
    if not np.any(rows.smooth[~chosen]):  # no smoothing
        slope = (rows.smooth * chosen).sum(-1, keepdims=True) * towards
    if gamma:
        # (1 - p_y)^gamma times the gradient of the cross-entropy, and the gradient of the power,
        # gamma q^(gamma - 1) p_y CE towards the label: nothing once q is.
        q, p_y = np.exp(rows.log_q), (p * chosen).sum(-1)
        ratio = np.where(q < np.finfo(np.float64).tiny, 0, _cross_entropy(rows) / q)
        focus = np.exp(gamma * rows.log_q)
        slope = (slope + (gamma * p_y * ratio)[..., None] * towards) * focus[..., None]
    grad = np.where(rows.counts[..., None], rows.factor[..., None] * slope, 0)
    return np.moveaxis(grad, -1, 1)
