"""GHM-C and GHM-R: the reference, pinned by facts from outside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton.reference import ghm as reference
from tests import peers
from tests.arrays import numpy


def by_bins(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor,
    mu: float | None,
    bins: int,
    momentum: float,
    acc_sum: Tensor | None,
) -> Tensor:
    """mmdet's rule, bin after bin, in double precision; differentiable by torch.

    Labels are one-hot targets here. ``acc_sum`` is changed.
    """
    valid = label_weight > 0
    edges = torch.arange(bins + 1, dtype=torch.float32) / bins
    if mu is None:
        edges[-1] += 1e-6
        g = (pred.detach().sigmoid() - target).abs()
        total = max(float(valid.sum()), 1.0)
        loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    else:
        edges[-1] = 1e3
        d = pred - target
        root = (d * d + mu * mu).sqrt()
        g, loss = (d.abs() / root).detach(), root - mu
        total = max(float(label_weight.sum()), 1.0)
    weight = torch.zeros_like(loss)
    filled = 0
    for i in range(bins):
        inside = (g >= edges[i].double()) & (g < edges[i + 1].double()) & valid
        count = int(inside.sum())
        if count == 0:
            continue
        filled += 1
        if acc_sum is None:
            weight[inside] = total / count
        else:
            acc_sum[i] = momentum * acc_sum[i] + (1 - momentum) * count
            weight[inside] = total / float(acc_sum[i])
    return (loss * (weight / max(filled, 1))).sum() / total


def test_edges_are_mmdets() -> None:
    assert reference.edges(30, None)[29] == np.float32(0.96666664)
    assert reference.edges(10, None)[-1] == np.float32(1) + np.float32(1e-6)
    assert reference.edges(10, 0.02)[-1] == 1000
    assert reference.edges(10, None).dtype == np.float32


def test_ghmc_by_hand() -> None:
    """g = 0.75, 0.75, 0.25 and a masked one: bins of 2 and 1, each of half the loss."""
    x = np.array([math.log(3), -math.log(3), -math.log(3), math.nan])
    t, w = np.array([0.0, 1.0, 0.0, 0.0]), np.array([1, 0.5, 7, 0])
    loss, grad, total, _, _ = reference.ghm_loss(x, t, w, bins=2)
    assert total == 3
    log = math.log(4), math.log(4 / 3)
    np.testing.assert_allclose(loss, [0.75 * log[0], 0.75 * log[0], 1.5 * log[1], 0], rtol=1e-12)
    np.testing.assert_allclose(grad, [0.75**2, -(0.75**2), 1.5 * 0.25, 0], rtol=1e-12)


def test_ghmr_by_hand() -> None:
    """d = 3, -4 and mu = 4: g = 0.6 and sqrt(1/2), one bin; the total is the weights' sum."""
    loss, grad, total, _, _ = reference.ghm_loss(
        np.array([3.0, 0.0]), np.array([0.0, 4.0]), np.array([1.5, 2.5]), mu=4.0, bins=2
    )
    assert total == 4
    np.testing.assert_allclose(loss, [2.0, 2 * (math.sqrt(32) - 4)], rtol=1e-12)
    np.testing.assert_allclose(grad, [2 * 0.6, -2 * math.sqrt(0.5)], rtol=1e-12)


def test_momentum_and_its_correction_by_hand() -> None:
    """A constant count corrected is that count; an empty bin neither decays nor counts."""
    counts = np.array([6, 0, 2])
    acc, steps = np.zeros(3), np.zeros(3, np.int64)
    for step in range(1, 4):
        raw, _, _ = reference.weights_of(counts, 8.0, acc, 0.75)
        w, acc, steps = reference.weights_of(counts, 8.0, acc, 0.75, steps)  # type: ignore[assignment]
        part = 1 - 0.75**step
        np.testing.assert_allclose(acc, counts * part)
        assert steps.tolist() == [step, 0, step]
        np.testing.assert_allclose(w, [8 / 12, 0, 2])
        np.testing.assert_allclose(raw, w / part)
    _, acc, _ = reference.weights_of(np.array([0, 4, 0]), 4.0, acc, 0.75)  # type: ignore[assignment]
    np.testing.assert_allclose(acc, [6 * part, 1, 2 * part])


@pytest.mark.parametrize("mu", [None, 0.02])
def test_gradient_is_torchs(mu: float | None, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(0, 3, (40, 20))).requires_grad_()
    t = torch.from_numpy(rng.random((40, 20)))
    t = torch.where(t < 0.5, t.round(), t)
    w = torch.from_numpy(rng.random((40, 20))).sub(0.2).clamp(0)
    loss = by_bins(x, t, w, mu, 10, 0, None)
    (grad,) = torch.autograd.grad(loss, x)
    got, slope, total, _, _ = reference.ghm_loss(numpy(x), numpy(t), numpy(w), mu)
    np.testing.assert_allclose(got.sum() / total, float(loss.detach()), rtol=1e-10)
    np.testing.assert_allclose(slope / total, numpy(grad), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("case", "arrays"), peers.cases("ghm"))
def test_reference_agrees_with_the_peers(case: Any, arrays: dict[str, Any]) -> None:
    args = case["args"]
    mu = args.get("mu")
    acc = np.zeros(args["bins"], np.float32) if args["momentum"] else None
    for i in range(args["steps"]):
        x, t, w = (arrays[f"{name}{i}"] for name in "xtw")
        # The peers ran in double precision on these.
        x, t = x.astype(np.float64), t if t.dtype == np.int64 else t.astype(np.float64)
        loss, grad, total, acc, _ = reference.ghm_loss(
            x, t, w, mu, args["bins"], args["momentum"], acc
        )
        if case["peer"].startswith("mmdet"):
            total += float(np.finfo(np.float32).eps)
        scale = args["loss_weight"] / total
        # Some peers round the weights to fp32.
        np.testing.assert_allclose(loss.sum() * scale, arrays[f"loss{i}"], rtol=1e-6)
        np.testing.assert_allclose(grad * scale, arrays[f"grad{i}"], rtol=1e-5, atol=1e-9)
        if acc is not None:
            np.testing.assert_allclose(acc, arrays[f"acc{i}"], rtol=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 10, 30])
@pytest.mark.parametrize("mu", [None, 0.02, 3.0])
@pytest.mark.parametrize("double", [False, True])
def test_thresholds_are_the_first_to_reach_an_edge(
    bins: int, mu: float | None, double: bool
) -> None:
    dtype = np.float64 if double else np.float32
    found = np.array(reference.thresholds(bins, mu, double), dtype)
    inner = reference.edges(bins, mu)[1:-1]
    assert len(found) == bins - 1
    assert (np.diff(found) > 0).all()
    zero = np.zeros_like(found)
    assert (reference.norm(found, zero, mu) >= inner).all()
    below = np.nextafter(found, dtype(-np.inf))
    assert (reference.norm(below, zero, mu) < inner).all()
