"""GHM-C and GHM-R in float64, with bins over edges in float32; and the thresholds of their bins."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def edges(bins: int, mu: float | None) -> Array:
    """float32 [bins + 1]: i / bins, of which the last is 1 + 1e-6 for GHM-C, 1e3 with ``mu``."""
    e = np.arange(bins + 1, dtype=np.float32) / np.float32(bins)
    e[-1] = e[-1] + np.float32(1e-6) if mu is None else 1e3
    return e


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def dense_targets(pred: Array, target: Array) -> Array:
    """Targets of the shape of ``pred``; labels out of range are all zeros."""
    if target.ndim == pred.ndim:
        return target
    return np.asarray(target[..., None] == np.arange(pred.shape[-1]))


def dense_weights(pred: Array, label_weight: Array | None) -> Array:
    if label_weight is None:
        return np.ones(pred.shape)
    if label_weight.ndim < pred.ndim:
        label_weight = label_weight[..., None]
    return np.broadcast_to(label_weight.astype(np.float64), pred.shape)


def difference(pred: Array, target: Array) -> Array:
    """pred - target, rounded once to the dtype of the arithmetic: float32, or float64 for that."""
    dtype = np.float64 if pred.dtype == np.float64 else np.float32
    return np.subtract(pred.astype(dtype), target.astype(dtype)).astype(np.float64)


@np.errstate(all="ignore")
def norm(pred: Array, target: Array, mu: float | None) -> Array:
    """g, the norm of the gradient: |sigmoid(x) - t| of GHM-C or |d| / sqrt(d^2 + mu^2) of GHM-R."""
    if mu is not None:
        return distance_norm(np.abs(difference(pred, target)), mu)
    x, t = pred.astype(np.float64), target.astype(np.float64)
    return np.where(t == 1, _sigmoid(-x), np.abs(_sigmoid(x) - t))


@np.errstate(all="ignore")
def distance_norm(d: Array, mu: float) -> Array:
    return np.asarray(d / np.hypot(d, mu))


def bin_of(g: Array, over: Array) -> Array:
    """The i with over[i] <= g < over[i + 1], and -1 outside and for NaN."""
    i = np.searchsorted(over.astype(np.float64), g, side="right") - 1
    return np.where((i >= len(over) - 1) | np.isnan(g), -1, i)


def membership(
    pred: Array, target: Array, label_weight: Array | None, mu: float | None, bins: int
) -> Array:
    """The bin of each element, -1 for none."""
    g = norm(pred, dense_targets(pred, target), mu)
    counts = dense_weights(pred, label_weight) > 0
    return np.where(counts, bin_of(g, edges(bins, mu)), -1)


def count(
    pred: Array, target: Array, label_weight: Array | None, mu: float | None, bins: int
) -> tuple[Array, float]:
    """int64 [bins], and the total before it is at least 1."""
    member = membership(pred, target, label_weight, mu, bins)
    weights = dense_weights(pred, label_weight)
    total = float(np.sum(weights > 0) if mu is None else np.sum(weights))
    return np.bincount(member[member >= 0], minlength=bins), total


@np.errstate(all="ignore")
def weights_of(
    counts: Array,
    total: float,
    acc_sum: Array | None = None,
    momentum: float = 0.0,
    steps: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """Weights of the bins, and ``acc_sum`` and ``steps`` as they are after this call.

    ``steps`` counts a bin's updates; with it the momentum's start from 0 is corrected.
    """
    some = counts > 0
    mass = counts.astype(np.float64)
    if acc_sum is not None:
        mass = momentum * acc_sum.astype(np.float64) + (1 - momentum) * mass
        acc_sum = np.where(some, mass, acc_sum).astype(acc_sum.dtype)
        mass = acc_sum.astype(np.float64)
        if steps is not None:
            steps = steps + some
            mass = mass / (1 - momentum**steps)
    return np.where(some, max(total, 1.0) / (mass * max(some.sum(), 1)), 0.0), acc_sum, steps


@np.errstate(all="ignore")
def elementwise(
    pred: Array,
    target: Array,
    label_weight: Array | None,
    weights: Array,
    mu: float | None,
) -> tuple[Array, Array]:
    """Weighted losses of the elements and their derivatives, from the weights of the bins."""
    member = membership(pred, target, label_weight, mu, len(weights))
    w = np.where(member >= 0, weights[member], 0.0)
    t = dense_targets(pred, target).astype(np.float64)
    if mu is None:
        x = pred.astype(np.float64)
        # max(x, 0) - x t, as a sum of terms of one sign for t in [0, 1]
        loss = np.abs(x) * np.where(x >= 0, 1 - t, t) + np.log1p(np.exp(-np.abs(x)))
        slope = np.where(t == 1, -_sigmoid(-x), _sigmoid(x) - t)
    else:
        d = difference(pred, dense_targets(pred, target))
        root = np.hypot(d, mu)
        loss, slope = np.abs(d) * (np.abs(d) / (root + mu)), d / root
    ignored = ~(dense_weights(pred, label_weight) > 0)
    return np.where(ignored, 0.0, w * loss), np.where(ignored, 0.0, w * slope)


def ghm_loss(
    pred: Array,
    target: Array,
    label_weight: Array | None = None,
    mu: float | None = None,
    bins: int = 10,
    momentum: float = 0.0,
    acc_sum: Array | None = None,
    steps: Array | None = None,
) -> tuple[Array, Array, float, Array | None, Array | None]:
    """Weighted losses, derivatives, the divisor of their mean, and the new momentum's state.

    GHM-R with ``mu``, else GHM-C.
    """
    counts, total = count(pred, target, label_weight, mu, bins)
    w, acc_sum, steps = weights_of(counts, total, acc_sum, momentum, steps)
    return *elementwise(pred, target, label_weight, w, mu), max(total, 1.0), acc_sum, steps


# ---- thresholds: g >= edge exactly where a logit, or a distance, reaches one


def _from_order(order: Array, dtype: npt.DTypeLike) -> Array:
    """The floating-point numbers at places ``order`` of their order, 0 being 0."""
    bits = np.dtype(dtype).itemsize * 8
    signed = np.int64 if bits == 64 else np.int32
    magnitude = np.abs(order).astype(signed)
    return np.where(order < 0, -magnitude.view(dtype), magnitude.view(dtype))


@np.errstate(all="ignore")
def thresholds(bins: int, mu: float | None, double: bool) -> tuple[float, ...]:
    """Where the bins 1, 2, ... begin, in the logit of a negative (of a positive it is minus the
    logit), or with ``mu`` in the distance: by bisection, the least float32 numbers, or float64
    ones, that reach their edge."""
    dtype, signed = (np.float64, np.int64) if double else (np.float32, np.int32)
    inner = edges(bins, mu)[1:-1].astype(np.float64)
    infinity = int(np.array(np.inf, dtype).view(signed))
    low = np.full(bins - 1, -infinity if mu is None else -1, object)  # Python's integers
    high = np.full(bins - 1, infinity, object)
    while (high - low > 1).any():
        middle = (low + high) // 2
        x = _from_order(middle.astype(np.int64), dtype).astype(np.float64)
        hit = (_sigmoid(x) if mu is None else distance_norm(x, mu)) >= inner
        high, low = np.where(hit, middle, high), np.where(hit, low, middle)
    return tuple(map(float, _from_order(high.astype(np.int64), dtype)))
