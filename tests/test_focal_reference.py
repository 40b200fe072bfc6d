"""Sigmoid focal loss: the reference, pinned by facts from outside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton.reference import focal as reference
from tests import peers
from tests.arrays import numpy


def textbook(x: Tensor, t: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """The usual formula, as torchvision writes it; differentiable by torch."""
    p = x.sigmoid()
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = bce * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    return loss if alpha is None else loss * (alpha * t + (1 - alpha) * (1 - t))


@pytest.mark.parametrize(
    ("x", "t", "loss"),
    [
        (0.0, True, 0.25 * 0.25 * math.log(2)),
        (0.0, False, 0.75 * 0.25 * math.log(2)),
        (100.0, False, 75.0),
        (-100.0, True, 25.0),
        (1e4, False, 7500.0),
        (math.log(3), True, 0.25 * 0.0625 * math.log(4 / 3)),
        (math.log(3), False, 0.75 * 0.5625 * math.log(4)),
        (1e4, True, 0.0),
    ],
)
def test_reference_by_hand(x: float, t: bool, loss: float) -> None:
    got = reference.sigmoid_focal_loss(np.array([x]), np.array([t]))
    np.testing.assert_allclose(got, [loss], rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("form", ["bool", "soft"])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_reference_is_the_textbook_formula(
    form: str, alpha: float | None, gamma: float, rng: np.random.Generator
) -> None:
    x = torch.from_numpy(rng.normal(0, 3, (40, 20))).requires_grad_()
    t = torch.from_numpy(rng.random((40, 20)))
    if form == "bool":
        t = (t < 0.3).double()
    loss = textbook(x, t, alpha, gamma)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    args = (numpy(x), numpy(t), alpha, gamma)
    np.testing.assert_allclose(reference.sigmoid_focal_loss(*args), numpy(loss), rtol=1e-9)
    np.testing.assert_allclose(
        reference.sigmoid_focal_loss_grad(*args), numpy(grad), rtol=1e-8, atol=1e-13
    )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_reference_gradient_is_a_finite_difference(gamma: float) -> None:
    x, t = np.meshgrid(np.linspace(-30, 30, 41), np.linspace(0, 1, 11))
    h = 1e-5
    up, down = (reference.sigmoid_focal_loss(x + d, t, 0.25, gamma) for d in (h, -h))
    grad = reference.sigmoid_focal_loss_grad(x, t, 0.25, gamma)
    np.testing.assert_allclose(grad, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("case", "arrays"), peers.cases("focal"))
def test_reference_agrees_with_the_peers(case: Any, arrays: dict[str, Any]) -> None:
    args, x, target = case["args"], arrays["x"], arrays["target"]
    by_mmcv = case["peer"].startswith("mmcv")
    alpha = None if args["alpha"] == -1 else args["alpha"]
    loss, grad = (
        f(x, target, alpha, args["gamma"], weight=arrays.get("weight"))
        for f in (reference.sigmoid_focal_loss, reference.sigmoid_focal_loss_grad)
    )
    factor = arrays["grad_out"].astype(np.float64)
    if args["reduction"] == "mean":
        # mmcv divides by the rows only.
        divisor = len(x) if by_mmcv else x.size
        if args.get("avg_factor"):  # mmdet's
            divisor = args["avg_factor"] + float(np.finfo(np.float32).eps)
        factor = factor / divisor
        loss = loss.sum() / divisor
    # mmcv takes expf even in double precision.
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-5 if by_mmcv else 1e-9, atol=1e-13)
    np.testing.assert_allclose(grad * factor, arrays["grad_x"], rtol=1e-6, atol=1e-12)
