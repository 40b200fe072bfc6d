"""GHM-C and GHM-R: kernels against the reference and mmdet's rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlops_triton import ghmc_loss, ghmr_loss
from dlops_triton.reference import ghm as reference
from tests.arrays import numpy
from tests.test_ghm_reference import by_bins
from tests.tolerances import assert_close

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [HALF, BFLOAT, FLOAT, DOUBLE]
# Empty, one, around one block of 1024, more than two dimensions, several blocks, one class.
SHAPES = [(0, 5), (3, 0), (1, 1), (3, 341), (4, 256), (5, 205), (2, 3, 7), (140, 80), (1100, 1)]


def arguments(
    form: str, weights: str, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Target and label weight."""
    if form == "labels":
        target = torch.from_numpy(np.asarray(rng.integers(-1, shape[-1] + 2, shape[:-1])))
    else:
        soft = rng.random(shape)
        target = torch.from_numpy(np.where(rng.random(shape) < 0.5, soft.round(), soft)).float()
    if weights == "none":
        return target, None
    of = shape[:-1] if weights == "row" else shape
    return target, torch.from_numpy(np.maximum(rng.random(of) - 0.2, 0)).float()


def loss_of(mu: float | None, *args: Any, **options: Any) -> Tensor:
    return ghmc_loss(*args, **options) if mu is None else ghmr_loss(*args, mu=mu, **options)


def wanted(x: Tensor, t: Tensor, w: Tensor | None, mu: float | None = None, bins: int = 10) -> Any:
    """Losses, slopes and total by the reference, which rounds d as the kernels do."""
    exact = x.detach().cpu()
    exact = exact if exact.dtype == DOUBLE else exact.float()
    return reference.ghm_loss(
        exact.numpy(), t.cpu().numpy(), None if w is None else w.cpu().numpy(), mu, bins
    )[:3]


# ---- against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("form", "weights"), [("labels", "none"), ("labels", "row"), ("dense", "element")]
)
def test_ghmc_matches_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    form: str,
    weights: str,
    kernel: torch.device,
    rng: np.random.Generator,
) -> None:
    x = torch.from_numpy(rng.normal(-1, 3, shape)).to(dtype).to(kernel).requires_grad_()
    t, w = arguments(form, weights, shape, rng)
    if dtype == DOUBLE and form == "dense":
        t = t.double()
    t, w = t.to(kernel), None if w is None else w.to(kernel)
    loss, slope, total = wanted(x, t, w)
    acc = DOUBLE if dtype == DOUBLE else FLOAT
    soft = 2 * np.abs(loss).max(initial=0) if form == "dense" else 0
    for reduction, divisor in (("mean", total), ("sum", 1.0)):
        got = ghmc_loss(x, t, w, reduction=reduction)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(got, x)
        assert got.dtype == acc
        assert grad.dtype == dtype
        assert_close(got, loss.sum() / divisor, compute=acc)
        assert_close(grad, slope / divisor, scale=soft / divisor)
    each = ghmc_loss(x, t, w, reduction="none")
    assert each.dtype == dtype
    assert_close(each, loss)
    g = torch.from_numpy(rng.normal(size=shape)).to(dtype).to(kernel)
    (grad,) = torch.autograd.grad(each, x, g)
    assert_close(grad, slope * numpy(g), scale=soft * np.abs(numpy(g)))


@pytest.mark.parametrize(("rows", "classes"), [(260, 80), (9, 3000)])
@pytest.mark.parametrize("row", [0, 3, 8])
@pytest.mark.parametrize("dtype", [BFLOAT, DOUBLE], ids=str)
def test_one_row_unlike_the_others(
    rows: int, classes: int, row: int, dtype: torch.dtype, kernel: torch.device
) -> None:
    """Most blocks hold plain negatives only; a row may lie across blocks or programs."""
    x = torch.randn(rows, classes, device=kernel).to(dtype).requires_grad_()
    t = torch.full((rows,), -1, device=kernel)
    w = torch.ones(rows, device=kernel)
    for ignored in (False, True):
        if ignored:
            w[row] = 0
        else:
            t[row * 25 % rows] = classes - 1
        weight = w if ignored else None
        loss, slope, total = wanted(x, t, weight)
        got = ghmc_loss(x, t, weight)
        assert_close(got, loss.sum() / total, compute=DOUBLE if dtype == DOUBLE else FLOAT)
        assert_close(torch.autograd.grad(got, x)[0], slope / total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["none", "row", "element"])
def test_ghmr_matches_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weights: str,
    kernel: torch.device,
    rng: np.random.Generator,
) -> None:
    x = torch.from_numpy(rng.normal(0, 0.05, shape)).to(dtype).to(kernel).requires_grad_()
    t = torch.from_numpy(rng.normal(0, 0.05, shape)).to(dtype).to(kernel)
    _, w = arguments("dense", weights, shape, rng)
    w = None if w is None else w.to(kernel)
    loss, slope, total = wanted(x, t.float() if dtype != DOUBLE else t, w, 0.02)
    acc = DOUBLE if dtype == DOUBLE else FLOAT
    for reduction, divisor in (("mean", total), ("sum", 1.0)):
        got = ghmr_loss(x, t, w, reduction=reduction)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(got, x)
        assert_close(got, loss.sum() / divisor, compute=acc)
        assert_close(grad, slope / divisor)
    each = ghmr_loss(x, t, w, reduction="none")
    (grad,) = torch.autograd.grad(each.sum(), x)
    assert_close(each, loss)
    assert_close(grad, slope)


@pytest.mark.parametrize("mu", [None, 0.02])
@pytest.mark.parametrize("momentum", [0, 0.7, 0.75])
@pytest.mark.parametrize("bins", [10, 30])
def test_steps_follow_mmdets_rule(
    mu: float | None, momentum: float, bins: int, device: torch.device, rng: np.random.Generator
) -> None:
    """34 steps each, of which some have no element that counts, or all in one bin."""
    acc = torch.zeros(bins, device=device) if momentum else None
    want_acc = torch.zeros(bins, dtype=DOUBLE) if momentum else None
    for step in range(34):
        n, c = int(rng.integers(1, 9)), int(rng.integers(1, 7))
        x = torch.from_numpy(rng.normal(0, 3 if mu is None else 0.1, (n, c))).float()
        if step % 9 == 3:
            x[:] = 0.01
        w = torch.from_numpy((rng.random((n, c)) * 1.5 - 0.4).clip(0)).float()
        if step % 7 == 2:
            w[:] = 0
        if mu is None:
            labels = torch.from_numpy(rng.integers(-1, c + 1, n))
            dense = (labels[:, None] == torch.arange(c)).double()
            t: Tensor = labels if step % 2 else dense
            w = (w[:, :1]).expand(n, c)
        else:
            t = torch.zeros(n, c)
            dense = t.double()
        leaf = x.double().requires_grad_()
        want = by_bins(leaf, dense, w.double(), mu, bins, momentum, want_acc)
        (want_grad,) = torch.autograd.grad(want, leaf)
        x = x.to(device).requires_grad_()
        got = loss_of(
            mu, x, t.to(device), w.to(device), bins=bins, momentum=momentum, acc_sum=acc
        )  # fmt: skip
        (grad,) = torch.autograd.grad(got, x)
        assert_close(got, numpy(want))
        assert_close(grad, numpy(want_grad))
        if acc is not None:
            assert_close(acc, numpy(want_acc))  # type: ignore[arg-type]


# ---- masks and bad data


@pytest.mark.parametrize("mu", [None, 0.02])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty(mu: float | None, reduction: str, device: torch.device) -> None:
    acc = torch.ones(10, device=device)
    for shape in ((0, 80), (3, 0)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        options: dict[str, Any] = {"momentum": 0.5, "acc_sum": acc, "reduction": reduction}
        loss = loss_of(mu, x, torch.zeros(shape, device=device), **options)
        loss.sum().backward()
        assert loss.shape == (shape if reduction == "none" else ())
        assert float(loss.detach().sum()) == 0
        assert x.grad is not None
        assert x.grad.shape == shape
    assert acc.tolist() == [1] * 10


@pytest.mark.parametrize("mu", [None, 0.02])
def test_without_momentum_the_state_is_left_alone(mu: float | None, device: torch.device) -> None:
    x, acc = torch.randn(5, 3, device=device), torch.ones(10, device=device)
    loss = loss_of(mu, x, x.sigmoid(), acc_sum=acc)
    assert torch.equal(loss, loss_of(mu, x, x.sigmoid()))
    assert acc.tolist() == [1] * 10


@pytest.mark.parametrize("mu", [None, 0.02])
def test_nothing_counts(mu: float | None, device: torch.device) -> None:
    x = torch.full((6, 5), float("nan"), device=device, requires_grad=True)
    acc = torch.ones(10, device=device)
    for w in (torch.zeros(6), torch.zeros(6, 5), torch.full((6, 5), float("nan"))):
        t = torch.zeros(6, 5, device=device)
        options: dict[str, Any] = {"momentum": 0.5, "acc_sum": acc}
        loss = loss_of(mu, x, t, w.to(device), **options)
        (grad,) = torch.autograd.grad(loss, x)
        if not bool(w.isnan().any()) or mu is None:
            assert float(loss.detach()) == 0
        assert grad.abs().max() == 0
        assert acc.tolist() == [1] * 10


@pytest.mark.parametrize("mu", [None, 0.02])
@pytest.mark.parametrize("weights", ["row", "element"])
@pytest.mark.parametrize("form", ["labels", "dense"])
def test_nan_does_not_leak(
    mu: float | None, weights: str, form: str, device: torch.device, rng: np.random.Generator
) -> None:
    t, w = arguments("dense" if mu else form, weights, (40, 6), rng)
    assert w is not None
    x = torch.from_numpy(rng.normal(0, 2, (40, 6))).float()
    keep = (w > 0)[:, None].expand(40, 6) if weights == "row" else w > 0
    results = []
    for junk in (0.0, math.nan, math.inf):
        pred = torch.where(keep, x, junk).to(device).requires_grad_()
        args = (pred, t.to(device), w.to(device))
        loss, each = loss_of(mu, *args), loss_of(mu, *args, reduction="none")
        grads = [torch.autograd.grad(y.sum(), pred)[0] for y in (loss, each)]
        results.append((loss, each, *grads))
        for y in (each, *grads):
            assert bool((y.cpu()[~keep] == 0).all())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_that_counts_spoils_the_loss_but_fills_no_bin(device: torch.device) -> None:
    x = torch.tensor([[-3.0, math.nan], [-3.0, 3.0]], device=device, requires_grad=True)
    acc = torch.zeros(10, device=device)
    t = torch.tensor([-1, 1], device=device)
    loss = ghmc_loss(x, t, momentum=0.5, acc_sum=acc)
    (grad,) = torch.autograd.grad(loss, x)
    assert bool(loss.isnan())
    assert grad.isnan().tolist() == [[False, True], [False, False]]
    assert acc.tolist() == [1.5] + [0] * 9
    each = ghmc_loss(x, t, reduction="none")
    assert each.isnan().tolist() == [[False, True], [False, False]]
    assert_close(each[1], [4 / 3 * math.log1p(math.exp(-3))] * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["labels", "dense"])
def test_extreme_logits_are_finite(dtype: torch.dtype, form: str, device: torch.device) -> None:
    x = torch.tensor([-1e4, -120.0, -17.0, 0.0, 17.0, 120.0, 1e4] * 2, dtype=dtype, device=device)
    x = x[:, None].repeat(1, 3).requires_grad_()
    labels = torch.tensor([-1] * 7 + [1] * 7, device=device)
    t = labels if form == "labels" else (labels[:, None] == torch.arange(3, device=device)).float()
    loss, slope, total = wanted(x, t, None)
    got = ghmc_loss(x, t)
    (grad,) = torch.autograd.grad(got, x)
    assert bool(got.isfinite())
    assert bool(grad.isfinite().all())
    assert_close(got, loss.sum() / total)
    assert_close(grad, slope / total)
    # The hardest examples are in the last bin, which 1 + 1e-6 ends.
    acc = torch.zeros(10, device=device)
    ghmc_loss(x, t, momentum=0.5, acc_sum=acc)
    want = reference.count(x.detach().float().cpu().numpy(), t.cpu().numpy(), None, None, 10)[0]
    assert (2 * acc).tolist() == want.tolist()
    far = torch.tensor([1e30, -3e38], device=device).requires_grad_()
    got = ghmr_loss(far, torch.tensor([0.0, 3e38], device=device), reduction="none")
    assert bool(got[0] > 1e30 / 3)


def test_targets_outside_0_and_1_are_in_no_bin(device: torch.device) -> None:
    x = torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0], device=device, requires_grad=True)
    t = torch.tensor([2.0, 50.0, -0.1, 0.3, 0.0], device=device)  # the last fills the last bin
    loss, slope, _ = wanted(x, t, None)
    each = ghmc_loss(x, t, reduction="none")
    (grad,) = torch.autograd.grad(each.sum(), x)
    assert each.tolist()[:2] == grad.tolist()[:2] == [0, 0]
    assert_close(each, loss)
    assert_close(grad, slope)
    assert_close(torch.autograd.grad(ghmc_loss(x, t, reduction="sum"), x)[0], slope)


@pytest.mark.parametrize("form", ["labels", "dense"])
def test_an_infinite_logit_is_in_the_first_or_the_last_bin(form: str, device: torch.device) -> None:
    x = torch.tensor([[math.inf], [-math.inf], [2.0]], device=device, requires_grad=True)
    t = torch.full((3,) if form == "labels" else (3, 1), -1 if form == "labels" else 0)
    _, slope, total = wanted(x, t, None)
    (grad,) = torch.autograd.grad(ghmc_loss(x, t.to(device)), x)
    assert grad[0] > 0
    assert_close(grad, slope / total)


# ---- forms of arguments


def test_forms_of_targets_and_weights_agree(device: torch.device, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(0, 2, (50, 6))).float().to(device)
    labels = torch.from_numpy(rng.integers(-2, 8, 50)).to(device)
    dense = labels[:, None] == torch.arange(6, device=device)
    w = torch.from_numpy(rng.random(50) - 0.3).to(device)
    want = ghmc_loss(x, labels, w)
    for t in (
        dense,
        dense.float(),
        dense.half(),
        dense.long(),
        labels.int(),
        labels.to(torch.int8),
    ):
        torch.testing.assert_close(ghmc_loss(x, t, w), want)
    for weight in (
        w * 1e-60, w[:, None].expand(50, 6), w[:, None].repeat(1, 6), w > 0, (w > 0).int(),
        ((w > 0)[:, None].repeat(1, 6)), w.bfloat16(),
    ):  # fmt: skip
        torch.testing.assert_close(ghmc_loss(x, labels, weight), want)
        torch.testing.assert_close(ghmc_loss(x, dense.double(), weight), want)
    far = torch.tensor([2**32 + 1, -(2**63), 2**63 - 1], device=device)
    assert torch.equal(ghmc_loss(x[:3], far), ghmc_loss(x[:3], torch.full_like(far, -1)))


def test_any_strides(device: torch.device, rng: np.random.Generator) -> None:
    head = torch.from_numpy(rng.normal(0, 2, (2, 12, 5, 7))).float().to(device)
    permuted = head.permute(0, 2, 3, 1)
    labels = torch.from_numpy(rng.integers(-1, 13, (2, 5, 7))).to(device)
    w = torch.from_numpy(rng.random((2, 5, 7)) - 0.2).float().to(device)
    for x, t, weight in (
        (permuted, labels, w),
        (permuted, labels, w[..., None].expand(2, 5, 7, 12)),
        (permuted, permuted.sigmoid(), w),
        (permuted[:, ::2, 1:, ::3], labels[:, ::2, 1:], w[:, ::2, 1:]),
        (head[0, 0, 0].expand(9, 7), torch.arange(9, device=device), None),
        (head.mT, head.mT > 0, head.mT),
    ):
        leaf = x.detach().requires_grad_()
        plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for reduction in ("mean", "none"):
            a = ghmc_loss(leaf, t, weight, reduction=reduction)  # type: ignore[arg-type]
            b = ghmc_loss(plain, t, weight, reduction=reduction)  # type: ignore[arg-type]
            torch.testing.assert_close(a, b)
            g = torch.randn(a.mT.shape, device=device).mT if a.dim() > 1 else torch.tensor(2.0)
            for grad in (g.to(device), torch.tensor(3.0, device=device).expand_as(a)):
                (p,) = torch.autograd.grad(a, leaf, grad, retain_graph=True)
                (q,) = torch.autograd.grad(b, plain, grad, retain_graph=True)
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize("mu", [None, 0.02])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_factors(mu: float | None, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(9, 4, dtype=dtype, device=device).requires_grad_()
    t, w = torch.zeros(9, 4, device=device), torch.rand(9, 4, device=device)
    total = float((w > 0).sum()) if mu is None else max(float(w.sum()), 1.0)
    mean = loss_of(mu, x, t, w)
    (unit,) = torch.autograd.grad(mean, x)
    for options, factor in (
        ({"avg_factor": 7}, total / 7),
        ({"avg_factor": torch.tensor(7, device=device)}, total / 7),
        ({"avg_factor": torch.tensor([0.7], device=device), "loss_weight": 0.1}, total / 7),
        ({"loss_weight": -0.3}, -0.3),
        ({"reduction": "sum", "loss_weight": 0.3}, total * 0.3),
    ):
        got = loss_of(mu, x, t, w, **options)
        (grad,) = torch.autograd.grad(got, x)
        torch.testing.assert_close(got, mean * factor, rtol=2e-6, atol=0)
        torch.testing.assert_close(grad, unit * factor, rtol=2e-6, atol=1e-9)
    each = loss_of(mu, x, t, w, reduction="none", loss_weight=0.3)
    torch.testing.assert_close(each.sum(), mean * total * 0.3, rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(each.sum(), x)
    torch.testing.assert_close(grad, unit * total * 0.3, rtol=2e-6, atol=1e-9)


def test_double_precision_factors_are_double(device: torch.device) -> None:
    x = torch.randn(5, 4, dtype=DOUBLE, device=device).requires_grad_()
    t = torch.zeros(5, 4, device=device)
    loss, slope, _ = wanted(x, t, None)
    for reduction in ("sum", "none"):
        got = ghmc_loss(x, t, loss_weight=0.3, reduction=reduction)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(got.sum(), x)
        assert_close(got.sum(), loss.sum() * 0.3)
        assert_close(grad, slope * 0.3)


@pytest.mark.parametrize("mu", [None, 0.02])
def test_bias_correction(mu: float | None, device: torch.device) -> None:
    """With a batch repeated, momentum then changes nothing; without, the first loss is 4 times."""
    x, t = torch.randn(20, 4, device=device) / 4, torch.zeros(20, 4, device=device)
    want = loss_of(mu, x, t)
    acc, steps = torch.zeros(10, device=device), torch.zeros(10, dtype=torch.int64, device=device)
    first = loss_of(mu, x, t, momentum=0.75, acc_sum=acc.clone())
    torch.testing.assert_close(first, want * 4)
    for i in range(3):
        options = {"momentum": 0.75, "acc_sum": acc, "bias_correction": steps}
        torch.testing.assert_close(loss_of(mu, x, t, **options), want)
        assert set(steps.tolist()) == {0, i + 1}
        assert torch.equal(steps > 0, acc > 0)
    with torch.no_grad():
        before = acc.clone(), steps.clone()
        torch.testing.assert_close(loss_of(mu, x, t, **options), want)
        assert torch.equal(acc, before[0])
        assert torch.equal(steps, before[1])
