"""Softmax focal loss: the kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton import softmax_focal_loss
from dlops_triton.reference import softmax_focal as reference
from tests.arrays import numpy
from tests.tolerances import assert_close
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import reversed_programs, shuffled
from tests.tools.traffic import traffic

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# One tile, two tiles, several programs, strided classes, a long row, long strided rows, none.
SHAPES = [
    *((1, 2), (300, 4), (130, 80), (3, 365), (2, 19, 5, 9), (3, 257, 70), (2, 5000)),
    *((1, 4097, 3), (0, 5), (2, 5, 0), (5, 1)),
]


def labels_of(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    rows = shape[:1] + shape[2:]
    labels = np.where(rng.random(rows) < 0.1, -100, rng.integers(-1, shape[1] + 1, rows))
    return torch.from_numpy(np.asarray(labels, np.int64))


def dtype_of_sum(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(
    dtype: torch.dtype, shape: tuple[int, ...], kernel: torch.device, rng: np.random.Generator
) -> None:
    x = torch.from_numpy(rng.normal(0, 4, shape)).to(dtype).to(kernel).requires_grad_()
    t = labels_of(shape, rng).to(kernel)
    want = reference.softmax_focal_loss(numpy(x), numpy(t))
    slope = reference.softmax_focal_loss_grad(numpy(x), numpy(t))
    each = softmax_focal_loss(x, t, reduction="none")
    g = torch.from_numpy(rng.normal(size=each.shape)).to(dtype).to(kernel)
    (grad,) = torch.autograd.grad(each, x, g)
    assert each.dtype == dtype
    assert_close(each, want)
    assert_close(grad, slope * numpy(g)[:, None])
    counts = (numpy(t) >= 0) & (numpy(t) < shape[1])
    for reduction, divisor in (("sum", 1), ("mean", max(counts.sum(), 1))):
        total = softmax_focal_loss(x, t, reduction=reduction)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(total, x)
        assert total.dtype == dtype_of_sum(dtype)
        assert_close(total, want.sum() / divisor)
        assert_close(grad, slope / divisor)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", ["none", "number", "classes"])
@pytest.mark.parametrize("weighted", ["", "classes", "samples"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_options(
    gamma: float,
    alpha: str,
    weighted: str,
    smoothing: float,
    kernel: torch.device,
    rng: np.random.Generator,
) -> None:
    for shape in ((9, 20), (2, 6, 7)):
        x = torch.from_numpy(rng.normal(0, 3, shape)).to(kernel).requires_grad_()
        t = labels_of(shape, rng).to(kernel)
        alphas = {"none": None, "number": 0.3, "classes": torch.rand(shape[1], device=kernel)}
        weights = {
            "": None,
            "classes": torch.rand(shape[1], device=kernel),
            "samples": torch.rand(t.shape, device=kernel),
        }
        a, w = alphas[alpha], weights[weighted]
        options: dict[str, Any] = {"label_smoothing": smoothing}
        args = (numpy(x), numpy(t), numpy(a) if isinstance(a, Tensor) else a, gamma)
        known = dict(options)
        if w is not None:
            known["class_weight" if weighted == "classes" else "sample_weight"] = numpy(w)
        want = reference.softmax_focal_loss(*args, **known)
        slope = reference.softmax_focal_loss_grad(*args, **known)
        loss = softmax_focal_loss(x, t, a, gamma, "sum", weight=w, **options)
        (grad,) = torch.autograd.grad(loss, x)
        assert_close(loss, want.sum())
        assert_close(grad, slope, scale=1)
        each = softmax_focal_loss(x, t, a, gamma, "none", weight=w, **options)
        assert_close(each, want)


@pytest.mark.parametrize("weighted", ["", "classes"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(12, 5), (3, 7, 2, 4), (9,)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gamma_0_is_cross_entropy(
    weighted: str, smoothing: float, shape: tuple[int, ...], reduction: Any, device: torch.device
) -> None:
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    classes = shape[min(1, len(shape) - 1)]
    t = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else (), device=device)
    if t.dim():
        t.view(-1)[0] = -100
    w = torch.rand(classes, dtype=torch.float64, device=device) if weighted else None
    got = softmax_focal_loss(x, t, None, 0, reduction, weight=w, label_smoothing=smoothing)
    want = F.cross_entropy(x, t, w, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    g = torch.randn_like(want)
    a, b = (torch.autograd.grad(loss, x, g)[0] for loss in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_layouts_are_read_in_place(kernel: torch.device) -> None:
    image = torch.randn(2, 21, 6, 8, device=kernel)
    t = torch.randint(0, 21, (2, 6, 8), device=kernel)
    for x in (
        image.contiguous(memory_format=torch.channels_last),
        image.transpose(2, 3).contiguous().transpose(2, 3),
        image[:, :, ::2],
        image[:1].expand(2, 21, 6, 8),
    ):
        labels = t[:, : x.shape[2]]
        leaf = x.detach().requires_grad_()
        plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for reduction in ("none", "mean"):
            got, want = (softmax_focal_loss(y, labels, reduction=reduction) for y in (leaf, plain))
            torch.testing.assert_close(got, want)
            g = torch.randn_like(want)
            g = g.mT.contiguous().mT if g.dim() else g
            a, b = torch.autograd.grad(got, leaf, g)[0], torch.autograd.grad(want, plain, g)[0]
            torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(softmax_focal_loss(leaf, t, reduction="none").sum(), leaf)
    assert grad.shape == leaf.shape


# ---- extremes and bad data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", ["rows", "columns", "long"])
def test_extreme_logits(dtype: torch.dtype, gamma: float, shape: str, device: torch.device) -> None:
    values = torch.tensor([-1e4, -100.0, -17.0, 0.0, 17.0, 30.0, 100.0, 1e4])
    x = torch.cartesian_prod(values, values, values).to(dtype)
    t = torch.arange(len(x)) % 3
    if shape == "columns":
        x = x.T.contiguous()[None]
        t = t[None]
    if shape == "long":
        x = torch.cat([x[::60], torch.full((9, 4998), -1e4, dtype=dtype)], 1)
        t = t[::60]
    x, t = x.to(device).requires_grad_(), t.to(device)
    for reduction in ("none", "sum"):
        loss = softmax_focal_loss(x, t, None, gamma, reduction)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        args = numpy(x), numpy(t), None, gamma
        want = reference.softmax_focal_loss(*args)
        assert_close(loss, want if reduction == "none" else want.sum())
        assert_close(grad, reference.softmax_focal_loss_grad(*args))
        assert bool(grad.isfinite().all())


def test_masked_classes(device: torch.device) -> None:
    x = torch.tensor([[-math.inf, 1.0, 2.0], [0.5, -math.inf, -math.inf]], device=device)
    x.requires_grad_()
    t = torch.tensor([1, 0], device=device)
    loss = softmax_focal_loss(x, t, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    kept = softmax_focal_loss(x.detach()[:1, 1:], torch.tensor([0], device=device))
    torch.testing.assert_close(loss[0], kept)
    assert loss[1] == 0
    assert bool(grad.isfinite().all())
    assert grad[0, 0] == 0
    assert grad[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(3, 5000), (1, 5000, 2)], ids=str)
def test_options_of_long_rows(
    shape: tuple[int, ...], kernel: torch.device, rng: np.random.Generator
) -> None:
    """Whose classes are taken a block at a time; of the first, none may be allowed."""
    w = torch.from_numpy(rng.uniform(0.5, 2, shape[1])).float().to(kernel)
    w[:2100] = 0
    masked = torch.from_numpy(rng.normal(20, 4, shape)).float().to(kernel)
    masked[:, :2100] = -math.inf
    for x in (masked, masked.clamp(min=-30)):
        x.requires_grad_()
        t = torch.full(shape[:1] + shape[2:], 4321, device=kernel)
        loss = softmax_focal_loss(x, t, reduction="sum", weight=w, label_smoothing=0.1)
        (grad,) = torch.autograd.grad(loss, x)
        args = numpy(x), numpy(t), None, 2.0
        options: dict[str, Any] = {"class_weight": numpy(w), "label_smoothing": 0.1}
        assert_close(loss, reference.softmax_focal_loss(*args, **options).sum())
        # The smoothing's share of a class cancels against the class's probability.
        share = 0.1 / shape[1] * float(w.max())
        assert_close(grad, reference.softmax_focal_loss_grad(*args, **options), scale=share)
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("shape", [(70, 5), (2, 5, 35)])
def test_rows_that_do_not_count_may_hold_anything(
    shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(shape, device=device)
    t = torch.randint(0, 5, shape[:1] + shape[2:], device=device)
    clean = softmax_focal_loss(x, t.masked_fill(t == 2, -100))
    x = torch.where(t.unsqueeze(1) == 2, math.nan, x).requires_grad_()
    for label in (-100, -1, 5, 2**40):
        labels = t.masked_fill(t == 2, label)
        loss = softmax_focal_loss(x, labels)
        (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss, clean)
        assert bool(grad.isfinite().all())
        assert bool((grad.movedim(1, -1)[t == 2] == 0).all())


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_counts(weighted: bool, device: torch.device) -> None:
    x = torch.randn(4, 3, device=device, requires_grad=True)
    w = torch.rand(3, device=device) if weighted else None
    loss = softmax_focal_loss(x, torch.full((4,), -100, device=device), weight=w)
    (grad,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == 0
    assert not grad.any()


# ---- behaviour inside torch


def test_gradcheck(device: torch.device) -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.tensor([[0, 4], [-100, 2], [5, 1]], device=device)
    alpha = torch.rand(5, device=device)
    for gamma, reduction, smoothing in (
        *((0, "mean", 0.0), (0.5, "none", 0.0), (2.0, "sum", 0.1), (3.0, "none", 0.1)),
    ):
        assert torch.autograd.gradcheck(
            lambda x, g=gamma, r=reduction, s=smoothing: softmax_focal_loss(
                x, t, alpha, g, r, label_smoothing=s
            ),
            (x,),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_backward_twice(dtype: torch.dtype, upstream: float, device: torch.device) -> None:
    x = torch.randn(20, 5, device=device, dtype=dtype, requires_grad=True)
    loss = softmax_focal_loss(x, torch.arange(20, device=device) % 6)
    g = torch.tensor(upstream, device=device)
    first, second = (torch.autograd.grad(loss, x, g, retain_graph=True)[0] for _ in range(2))
    kept = first.clone()
    assert torch.equal(first, second)
    torch.autograd.grad(loss, x, 2 * g, retain_graph=True)
    assert torch.equal(first, kept)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="softmax_focal_loss can be differentiated once only"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(4096, 80), (64, 5000), (2, 40, 3300)])
def test_order_of_64_programs_does_not_matter(shape: tuple[int, ...], kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    x = torch.randn(shape, requires_grad=True)
    t = torch.randint(0, shape[1], shape[:1] + shape[2:])

    def run() -> list[Tensor]:
        with traffic() as meter:
            loss = softmax_focal_loss(x, t, reduction="sum")
            grads = torch.autograd.grad(loss, x)
        assert meter.programs >= 64
        return [loss, *grads]

    want = run()
    for order in (shuffled(1), reversed_programs()):
        with order:
            got = run()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("columns", [False, True])
def test_traffic(columns: bool, kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    n, c = 1600, 80
    shape = (1, c, n) if columns else (n, c)
    x = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    t = torch.zeros((1, n) if columns else n, dtype=torch.long)
    with traffic(sectors=True) as meter:
        softmax_focal_loss(x, t, reduction="sum").backward()
    least = 2 * n * c * 2 + 8 * n
    assert least <= meter.dram <= 1.05 * (least + 4 * n)
    assert meter.kernels == ["softmax_focal_kernel", "scale_kernel"]


def test_launches_and_synchronisations(kernel: torch.device) -> None:
    x = torch.randn(20, 5, device=kernel, requires_grad=True)
    t = torch.arange(20, device=kernel) % 5
    w = torch.rand(5, device=kernel)
    for options in (
        {"reduction": "sum"},
        {"weight": w, "label_smoothing": 0.1},
        {"avg_factor": 3.0, "alpha": w},
        {"avg_factor": w[:1]},
        {"reduction": "none"},
    ):
        with host_cost() as cost:
            loss = softmax_focal_loss(x, t, **options)  # type: ignore[arg-type]
        assert cost.launches == ["softmax_focal_kernel"]
        assert cost.synchronisations == []
        with host_cost() as cost:
            loss.sum().backward()
        assert len(cost.launches) == 1
        assert cost.synchronisations == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": 1.0}, TypeError, "inputs must be a torch.Tensor, got float"),
        ({"inputs": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "inputs .*got torch.int64"),
        ({"inputs": torch.zeros(4, 0)}, ValueError, r"C >= 1, got \(4, 0\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(4,\), got \(3,\)"),
        ({"targets": torch.zeros(4)}, TypeError, "targets must have one of .*got torch.float32"),
        ({"targets": torch.zeros(4, 3, device="meta")}, ValueError, "device of inputs, cpu, got m"),
        ({"alpha": -0.5}, ValueError, "alpha must be at least 0 and finite, got -0.5"),
        ({"alpha": torch.ones(4)}, ValueError, r"alpha .*\(3,\), got \(4,\)"),
        ({"alpha": torch.ones(3, requires_grad=True)}, ValueError, "alpha must not require"),
        ({"gamma": -1}, ValueError, r"gamma must be in \[0, 1e6\], got -1"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', .*got 'avg'"),
        ({"weight": torch.ones(5)}, ValueError, r"weight .*\(3,\) or \(4,\), got \(5,\)"),
        ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "weight .*got torch.int64"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight must not require"),
        ({"avg_factor": 2.0, "reduction": "sum"}, ValueError, "avg_factor needs reduction='mean'"),
        ({"avg_factor": 0}, ValueError, "avg_factor .*above 0.*got 0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be .*got 1.5"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_rejected(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "inputs": torch.zeros(4, 3),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        softmax_focal_loss(**(arguments | change))
