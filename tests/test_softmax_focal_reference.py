"""Softmax focal loss: the reference, pinned by facts from outside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dlops_triton.reference import softmax_focal as reference
from tests import peers
from tests.arrays import numpy


@pytest.mark.parametrize(
    ("logits", "label", "loss"),
    [
        ([0.0, 0.0], 0, 0.25 * math.log(2)),
        ([math.log(3), 0.0], 0, 0.0625 * math.log(4 / 3)),
        ([math.log(3), 0.0], 1, 0.5625 * math.log(4)),
        ([1e4, 0.0, 0.0], 1, 1e4),
        ([1e4, 0.0, 0.0], 0, 0.0),
        ([0.0, 0.0, -math.inf], 1, 0.25 * math.log(2)),
        ([1.0, 2.0], 2, 0.0),  # no class
        ([1.0, 2.0], -100, 0.0),
    ],
)
def test_reference_by_hand(logits: list[float], label: int, loss: float) -> None:
    got = reference.softmax_focal_loss(np.array([logits]), np.array([label]))
    np.testing.assert_allclose(got, [loss], rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_gamma_0_is_cross_entropy(
    reduction: str, smoothing: float, weighted: bool, rng: np.random.Generator
) -> None:
    x = torch.from_numpy(rng.normal(0, 3, (6, 5, 4))).requires_grad_()
    t = torch.from_numpy(rng.integers(0, 5, (6, 4)))
    t[0] = -100
    w = torch.from_numpy(rng.random(5)) if weighted else None
    want = F.cross_entropy(x, t, w, reduction=reduction, label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(want.sum(), x)
    options: dict[str, Any] = {
        "class_weight": None if w is None else numpy(w),
        "label_smoothing": smoothing,
    }
    loss = reference.softmax_focal_loss(numpy(x), numpy(t), None, 0.0, **options)
    np.testing.assert_allclose(
        loss if reduction == "none" else loss.sum(), numpy(want), rtol=1e-12, atol=1e-14
    )
    got = reference.softmax_focal_loss_grad(numpy(x), numpy(t), None, 0.0, **options)
    np.testing.assert_allclose(got, numpy(grad), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_the_textbook_formula(
    gamma: float, smoothing: float, rng: np.random.Generator
) -> None:
    x = torch.from_numpy(rng.normal(0, 3, (20, 7))).requires_grad_()
    t = torch.from_numpy(rng.integers(0, 7, 20))
    alpha, weight = torch.from_numpy(rng.random(7)), torch.from_numpy(rng.random(20))
    p = x.softmax(1).gather(1, t[:, None])[:, 0]
    entropy = F.cross_entropy(x, t, reduction="none", label_smoothing=smoothing)
    want = alpha[t] * weight * (1 - p) ** gamma * entropy
    (grad,) = torch.autograd.grad(want.sum(), x)
    options: dict[str, Any] = {"sample_weight": numpy(weight), "label_smoothing": smoothing}
    args = (numpy(x), numpy(t), numpy(alpha), gamma)
    np.testing.assert_allclose(
        reference.softmax_focal_loss(*args, **options), numpy(want), rtol=1e-9
    )
    np.testing.assert_allclose(
        reference.softmax_focal_loss_grad(*args, **options), numpy(grad), rtol=1e-7, atol=1e-13
    )


@pytest.mark.parametrize(("case", "arrays"), peers.cases("softmax_focal"))
def test_reference_agrees_with_the_peers(case: Any, arrays: dict[str, Any]) -> None:
    args, x, labels = case["args"], arrays["x"], arrays["labels"]
    options = (x, labels, args["alpha"], args["gamma"])
    loss = reference.softmax_focal_loss(*options)
    grad = reference.softmax_focal_loss_grad(*options)
    divisor = len(x) if args["reduction"] == "mean" else 1
    # mmcv's loss saturates at -log of the smallest float, and its gradient there differs.
    log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    sound = log_p[np.arange(len(x)), np.clip(labels, 0, x.shape[1] - 1)] > -87
    if sound.all():
        np.testing.assert_allclose(loss.sum() / divisor, arrays["loss"], rtol=1e-5, atol=1e-12)
    factor = arrays["grad_out"].astype(np.float64) / divisor
    np.testing.assert_allclose(
        (grad * factor)[sound], arrays["grad_x"][sound], rtol=1e-6, atol=1e-9
    )
