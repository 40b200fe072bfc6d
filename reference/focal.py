"""Sigmoid focal loss and its gradient, in float64 and in log space."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _dense_targets(targets: Array, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Targets of ``shape`` in [0, 1], and the labels if there were labels."""
    if targets.shape == shape:
        return np.clip(targets.astype(np.float64), 0, 1), None
    return (targets[..., None] == np.arange(shape[-1])).astype(np.float64), targets


@np.errstate(all="ignore")  # log 0; and infinite logits give what they give
def _terms(
    inputs: Array,
    targets: Array,
    alpha: float | None,
    weight: Array | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Array, ...]:
    """log p, log q, log(1 - p_t), t, the cross-entropy, and alpha_t times the weight."""
    x = inputs.astype(np.float64)
    t, labels = _dense_targets(targets, x.shape)
    factor = np.ones_like(x)
    if weight is not None:
        factor *= weight if weight.shape == x.shape else weight[..., None]
    if labels is not None:
        ignored = np.broadcast_to((labels == ignore_index)[..., None], x.shape)
        factor[ignored] = 0
        x = np.where(ignored, 0, x)
    t = t * (1 - label_smoothing) + label_smoothing / 2
    if alpha is not None:
        factor *= alpha * t + (1 - alpha) * (1 - t)
    log_p, log_q = -np.logaddexp(0, -x), -np.logaddexp(0, x)
    log_u = np.logaddexp(log_p + np.log1p(-t), log_q + np.log(t))
    return log_p, log_q, log_u, t, -(t * log_p + (1 - t) * log_q), factor


@np.errstate(all="ignore")
def sigmoid_focal_loss(
    inputs: Array,
    targets: Array,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """Elementwise loss, float64 [..., C]; arguments as in ``dlops_triton.sigmoid_focal_loss``."""
    _, _, log_u, _, bce, factor = _terms(
        inputs, targets, alpha, weight, ignore_index, label_smoothing
    )
    return factor * np.exp(gamma * log_u) * bce


@np.errstate(all="ignore")
def sigmoid_focal_loss_grad(
    inputs: Array,
    targets: Array,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """Elementwise derivative of the loss by its own logit, float64 [..., C]."""
    log_p, log_q, log_u, t, bce, factor = _terms(
        inputs, targets, alpha, weight, ignore_index, label_smoothing
    )
    focus = gamma * (1 - 2 * t) * np.exp(log_p + log_q - log_u) * bce
    return factor * np.exp(gamma * log_u) * (np.exp(log_p) * (1 - t) - np.exp(log_q) * t + focus)
