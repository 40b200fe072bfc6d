"""Sigmoid focal loss: the reference against outside facts, the kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlops_triton import sigmoid_focal_loss
from dlops_triton.reference import focal as reference
from tests.arrays import numpy
from tests.tolerances import assert_close
from tests.tools.interpreter import shuffled

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Empty, one, around one block of 1024 elements, more than two dimensions, several blocks.
SHAPES = [(0, 5), (3, 0), (1, 1), (3, 341), (4, 256), (5, 205), (2, 3, 7), (29, 80), (1500,)]
GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def targets_of(form: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    if form == "labels":
        classes = max(shape[-1], 1)
        labels = rng.integers(-2, classes + 2, shape[:-1])
        labels = np.where(rng.random(shape[:-1]) < 0.1, -100, labels)
        return torch.from_numpy(np.asarray(labels, np.int64))
    if form == "bool":
        return torch.from_numpy(np.asarray(rng.random(shape) < 0.3))
    soft = rng.random(shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.5, soft.round(), soft)).float()


# ---- the op against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["labels", "bool", "soft"])
def test_matches_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    form: str,
    kernel: torch.device,
    rng: np.random.Generator,
) -> None:
    x = torch.from_numpy(rng.normal(0, 4, shape)).to(dtype).to(kernel).requires_grad_()
    t = targets_of(form, shape, rng).to(kernel)
    g = torch.from_numpy(rng.normal(size=shape)).to(dtype).to(kernel)
    loss = sigmoid_focal_loss(x, t)
    loss.backward(g)
    want = reference.sigmoid_focal_loss(numpy(x), numpy(t))
    grad = reference.sigmoid_focal_loss_grad(numpy(x), numpy(t))
    assert loss.dtype == dtype
    assert loss.shape == x.shape
    assert_close(loss, want)
    assert x.grad is not None
    # p (1 - t) - q t cancels for soft targets.
    assert_close(x.grad, numpy(g) * grad, scale=np.abs(numpy(g)) if form == "soft" else 0)

    for reduction in ("sum", "mean"):
        x.grad = None
        total = sigmoid_focal_loss(x, t, reduction=reduction)
        total.backward()
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        divisor = max(x.numel(), 1) if reduction == "mean" else 1
        assert total.dtype == acc
        assert_close(total, want.sum() / divisor, compute=acc)
        assert_close(x.grad, grad / divisor, scale=1 / divisor if form == "soft" else 0)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, -1, 0.0, 0.25, 1])
@pytest.mark.parametrize("form", ["labels", "soft"])
def test_alpha_and_gamma(
    gamma: float, alpha: float | None, form: str, kernel: torch.device, rng: np.random.Generator
) -> None:
    x = torch.from_numpy(rng.normal(0, 4, (16, 20))).to(kernel).requires_grad_()
    t = targets_of(form, (16, 20), rng).to(kernel)
    loss = sigmoid_focal_loss(x, t, alpha, gamma)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    args = (numpy(x), numpy(t), None if alpha == -1 else alpha, gamma)
    assert_close(loss, reference.sigmoid_focal_loss(*args))
    assert_close(grad, reference.sigmoid_focal_loss_grad(*args), scale=form == "soft")


@pytest.mark.parametrize("per", ["row", "element"])
@pytest.mark.parametrize("form", ["labels", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weight_smoothing_and_avg_factor(
    per: str, form: str, reduction: str, device: torch.device, rng: np.random.Generator
) -> None:
    shape = (7, 6, 5)
    x = torch.from_numpy(rng.normal(0, 4, shape)).to(device).requires_grad_()
    t = targets_of(form, shape, rng).to(device)
    w = torch.from_numpy(rng.random(shape[:-1] if per == "row" else shape)).float().to(device)
    options: dict[str, Any] = {"label_smoothing": 0.1}
    divisor = 1.0
    if reduction == "mean":
        options["avg_factor"], divisor = torch.tensor(3.0, device=device), 3.0
    loss = sigmoid_focal_loss(x, t, reduction=reduction, weight=w, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss.sum(), x)
    terms = {"weight": numpy(w), "label_smoothing": 0.1}
    want = reference.sigmoid_focal_loss(numpy(x), numpy(t), **terms)  # type: ignore[arg-type]
    want_grad = reference.sigmoid_focal_loss_grad(numpy(x), numpy(t), **terms)  # type: ignore[arg-type]
    assert_close(loss, want if reduction == "none" else want.sum() / divisor)
    assert_close(grad, want_grad / divisor, scale=1)


def test_avg_factor_as_number_and_tensor_agree(device: torch.device) -> None:
    x, t = torch.randn(9, 4, device=device), torch.zeros(9, dtype=torch.long, device=device)
    want = sigmoid_focal_loss(x, t, reduction="sum") / 7
    for avg_factor in (7, 7.0, torch.tensor(7, device=device), torch.tensor([7.0], device=device)):
        got = sigmoid_focal_loss(x, t, reduction="mean", avg_factor=avg_factor)
        assert got.shape == ()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_every_label_dtype(labels: torch.dtype, device: torch.device) -> None:
    x = torch.randn(50, 6, device=device)
    t = torch.arange(50, device=device) % 8
    torch.testing.assert_close(
        sigmoid_focal_loss(x, t.to(labels)), sigmoid_focal_loss(x, t), rtol=0, atol=0
    )


@pytest.mark.parametrize("ignore_index", [1, 255])
def test_ignore_index(ignore_index: int, device: torch.device) -> None:
    """One of the classes, or one that only uint8 labels use."""
    x = torch.randn(60, 4, device=device, requires_grad=True)
    t = torch.tensor([0, 1, 2, 3, 4, 255], dtype=torch.uint8, device=device).repeat(10)
    loss = sigmoid_focal_loss(x, t, ignore_index=ignore_index)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    args = numpy(x), numpy(t)
    assert_close(loss, reference.sigmoid_focal_loss(*args, ignore_index=ignore_index))
    assert_close(grad, reference.sigmoid_focal_loss_grad(*args, ignore_index=ignore_index))
    for got in (loss, grad):
        assert torch.equal((got == 0).all(1), t == ignore_index)


def test_far_labels_are_background(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    far = torch.tensor([2**32 + 1, -(2**63), 2**63 - 1], device=device)
    want = sigmoid_focal_loss(x, torch.full((3,), 4, device=device))
    assert torch.equal(sigmoid_focal_loss(x, far), want)


def test_targets_off_by_a_rounding(device: torch.device) -> None:
    x = torch.tensor([2.0, -2.0, 2.0, -2.0], device=device)
    t = torch.tensor([1 + 1.2e-7, -1e-9, 1.0, 0.0], device=device)
    loss = sigmoid_focal_loss(x, t)
    assert torch.equal(loss[:2], loss[2:])


# ---- properties


def test_labels_are_one_hot_targets_bitwise(device: torch.device) -> None:
    x = torch.randn(70, 30, device=device)
    labels = torch.randint(0, 31, (70,), device=device)
    dense = F.one_hot(labels, 31)[:, :30]
    for form in (dense.bool(), dense.float(), dense.half()):
        assert torch.equal(sigmoid_focal_loss(x, labels), sigmoid_focal_loss(x, form))


def test_gamma_0_without_alpha_is_cross_entropy(device: torch.device) -> None:
    x = torch.randn(500, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(500, dtype=torch.float64, device=device)
    got = sigmoid_focal_loss(x, t, alpha=None, gamma=0)
    want = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    gamma=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_positive_and_negative_mirror_each_other(x: list[float], gamma: float) -> None:
    logits = torch.tensor(x)
    positive = torch.ones_like(logits, dtype=torch.bool)
    a = sigmoid_focal_loss(logits, positive, 0.25, gamma)
    b = sigmoid_focal_loss(-logits, ~positive, 0.75, gamma)
    assert torch.equal(a, b)
    assert bool((a >= 0).all())
    assert bool(a.isfinite().all())


# ---- extremes and bad data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("form", ["labels", "soft"])
def test_extreme_logits_are_finite(
    dtype: torch.dtype, gamma: float, form: str, device: torch.device
) -> None:
    values = [-1e4, -120.0, -88.0, -17.0, 0.0, 17.0, 88.0, 120.0, 1e4]
    x = torch.tensor(values, dtype=dtype, device=device)[:, None].repeat(1, 3).requires_grad_()
    if form == "labels":
        t = torch.tensor([0, 1, 2] * 3, device=device)
    else:
        t = torch.tensor([0.0, 0.3, 1.0], device=device).expand(9, 3)
    loss = sigmoid_focal_loss(x, t, gamma=gamma)
    loss.backward(torch.ones_like(loss))
    assert x.grad is not None
    assert bool(loss.isfinite().all())
    assert bool(x.grad.isfinite().all())
    assert_close(loss, reference.sigmoid_focal_loss(numpy(x), numpy(t), 0.25, gamma))
    want = reference.sigmoid_focal_loss_grad(numpy(x), numpy(t), 0.25, gamma)
    assert_close(x.grad, want, scale=form == "soft")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_background_at_100_is_75(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.full((1, 4), 100.0, dtype=dtype, device=device)
    for label in (4, -1):
        loss = sigmoid_focal_loss(x, torch.tensor([label], device=device))
        assert loss.tolist() == [[75.0] * 4]


def test_nan_stays_in_its_element_and_out_of_ignored_rows(device: torch.device) -> None:
    x = torch.randn(4, 3, device=device)
    x[1] = float("nan")
    x[2, 0] = float("inf")
    x.requires_grad_()
    t = torch.tensor([0, -100, 1, 5], device=device)
    loss = sigmoid_focal_loss(x, t)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    for got in (loss, grad):
        assert got[1].tolist() == [0, 0, 0]
        assert bool(got[[0, 3]].isfinite().all())
        assert bool(got[2, 1:].isfinite().all())
    clean = x.detach().clone()
    clean[2, 0] = 0
    total = sigmoid_focal_loss(clean, t, reduction="sum")
    assert bool(total.isfinite())


def test_a_divisor_of_0_on_the_device_is_the_callers(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    zero = torch.zeros((), device=device)
    t = torch.zeros(3, 4, device=device)
    loss = sigmoid_focal_loss(x, t, reduction="mean", avg_factor=zero)
    loss.backward()
    assert bool(loss.isinf())
    assert x.grad is not None
    assert bool(x.grad.isinf().all())
    labels = torch.tensor([0, -100, 1], device=device)
    loss = sigmoid_focal_loss(x, labels, reduction="mean", avg_factor=zero)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty(reduction: Any, device: torch.device) -> None:
    x = torch.zeros(0, 80, device=device, requires_grad=True)
    loss = sigmoid_focal_loss(
        x, torch.zeros(0, dtype=torch.long, device=device), reduction=reduction
    )
    loss.sum().backward()
    assert loss.shape == ((0, 80) if reduction == "none" else ())
    assert float(loss.detach().sum()) == 0
    assert x.grad is not None
    assert x.grad.shape == (0, 80)


def test_any_strides(device: torch.device, rng: np.random.Generator) -> None:
    head = torch.from_numpy(rng.normal(size=(2, 12, 5, 7))).to(device)
    permuted = head.permute(0, 2, 3, 1).reshape(2, 35, 12)[:, ::2, 1::3]
    labels = torch.from_numpy(rng.integers(0, 5, (2, 36))).to(device)[:, ::2]
    for x, t in (
        (permuted, labels),
        (head[0, 0, 0].expand(9, 7), torch.arange(9, device=device)),
        (head.mT, (head.mT > 0)),
        (head[:, 0, 0], torch.tensor(0.3, device=device).expand(2, 7)),
    ):
        leaf = x.detach().requires_grad_()
        copy = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        got, want = sigmoid_focal_loss(leaf, t), sigmoid_focal_loss(copy, t.contiguous())
        assert torch.equal(got, want)
        # An expanded and a strided gradient.
        for g in (torch.tensor(2.0, device=device).expand_as(got), (got.detach().mT.clone()).mT):
            (a,) = torch.autograd.grad(got, leaf, g.to(got.dtype), retain_graph=True)
            (b,) = torch.autograd.grad(
                want, copy, g.to(got.dtype).clone(memory_format=torch.contiguous_format),
                retain_graph=True,
            )  # fmt: skip
            assert torch.equal(a, b)


# ---- behaviour inside torch


def test_gradcheck(device: torch.device) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.tensor([0, 3, -100, 2], device=device)
    soft = torch.rand(4, 3, dtype=torch.float64, device=device)
    for gamma in (0, 0.5, 2.0):
        for t, reduction in ((labels, "none"), (labels, "sum"), (soft, "none"), (soft, "mean")):
            assert torch.autograd.gradcheck(
                lambda x, t=t, g=gamma, r=reduction: sigmoid_focal_loss(x, t, 0.3, g, r),
                (x,),
                fast_mode=True,
            )


def test_backward_twice_and_double_backward(device: torch.device) -> None:
    x = torch.randn(20, 5, device=device, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.arange(20, device=device) % 6, reduction="sum")
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="sigmoid_focal_loss can be differentiated once only"):
        grad.sum().backward()


def test_order_of_programs_does_not_matter(kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    x = torch.randn(60, 80, requires_grad=True)
    t = torch.randint(0, 81, (60,))

    def run() -> list[Tensor]:
        loss = sigmoid_focal_loss(x, t, reduction="sum")
        return [loss, *torch.autograd.grad(loss, x)]

    want = run()
    for seed in range(3):
        with shuffled(seed):
            got = run()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": 1.0}, TypeError, "inputs must be a torch.Tensor, got float"),
        ({"inputs": [1.0], "targets": [2.0]}, TypeError, r"inputs\[0\] must be a torch.Tensor"),
        ({"inputs": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "inputs .*got torch.int64"),
        ({"targets": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"\(4,\), got \(4, 3\)"),
        ({"targets": torch.zeros(4, 2)}, ValueError, r"\(4, 3\), got \(4, 2\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(4,\), got \(3,\)"),
        ({"targets": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"targets": torch.zeros(4, 3, requires_grad=True)}, ValueError, "targets must not req"),
        ({"targets": torch.zeros(4, 3, device="meta")}, ValueError, "device of inputs, cpu, got m"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\].*got 1.5"),
        ({"alpha": math.nan}, ValueError, "alpha .*got nan"),
        ({"alpha": "0.25"}, TypeError, "alpha must be a number .*got str '0.25'"),
        ({"alpha": -0.5}, ValueError, "alpha .*got -0.5"),
        ({"gamma": -1}, ValueError, r"gamma must be in \[0, 1e6\], got -1"),
        ({"gamma": 10**400}, ValueError, "gamma .*got 1000"),
        ({"gamma": math.inf}, ValueError, "gamma .*got inf"),
        ({"gamma": True}, TypeError, "gamma must be a number .*got bool True"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', .*got 'avg'"),
        ({"weight": torch.ones(3)}, ValueError, r"weight .*\(4,\) or \(4, 3\), got \(3,\)"),
        ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "weight .*got torch.int64"),
        ({"avg_factor": 2.0}, ValueError, "avg_factor needs reduction='mean', .*'none'"),
        ({"avg_factor": 0, "reduction": "mean"}, ValueError, "avg_factor .*above 0.*got 0"),
        ({"avg_factor": torch.ones(2), "reduction": "mean"}, ValueError, r"got shape \(2,\)"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be .*got 1.5"),
        ({"weight": torch.ones(4, requires_grad=True)}, ValueError, "weight must not require"),
        (
            {"avg_factor": torch.ones(1, requires_grad=True), "reduction": "mean"},
            ValueError,
            "avg_factor must not require",
        ),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_rejected(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"inputs": torch.zeros(4, 3), "targets": torch.zeros(4, 3)}
    with pytest.raises(error, match=message):
        sigmoid_focal_loss(**(arguments | change))
