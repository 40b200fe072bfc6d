"""Sigmoid focal loss, reduced over labels: loss and gradient of one launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlops_triton import _dispatch, _focal_sum, _settings, sigmoid_focal_loss
from dlops_triton.reference import focal as reference
from tests.arrays import numpy
from tests.tolerances import assert_close
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import reversed_programs, shuffled
from tests.tools.traffic import traffic

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def labels_of(shape: tuple[int, ...], classes: int, rng: np.random.Generator) -> Tensor:
    """Mostly background, as in a detector; every kind of label is there in many rows."""
    labels = np.where(rng.random(shape) < 0.05, rng.integers(0, classes, shape), classes)
    for label in (-100, -1, classes + 7):
        labels = np.where(rng.random(shape) < 0.02, label, labels)
    return torch.from_numpy(labels)


def dtype_of_sum(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Of a tensor in memory: [N, C]; [N, C, HW], with the classes in the middle; a head of A anchors.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x.flatten(0, -2),
    "columns": lambda x: x.flatten(0, -3).mT,
    "head": lambda x: x.permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, ::2, 1:],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_the_reference(
    dtype: torch.dtype, layout: str, kernel: torch.device, rng: np.random.Generator
) -> None:
    memory = torch.from_numpy(rng.normal(-1, 4, (2, 3, 37, 411))).to(dtype).to(kernel)
    x = LAYOUTS[layout](memory).detach().requires_grad_()
    t = labels_of(tuple(x.shape[:-1]), x.shape[-1], rng).to(kernel)
    want = reference.sigmoid_focal_loss(numpy(x), numpy(t)).sum()
    want_grad = reference.sigmoid_focal_loss_grad(numpy(x), numpy(t))
    for scale in (1.0, 3.0):
        loss = sigmoid_focal_loss(x, t, reduction="sum")
        (grad,) = torch.autograd.grad(loss * scale, x)
        assert loss.dtype == dtype_of_sum(dtype)
        assert_close(loss, want)
        assert_close(grad, want_grad * scale)
        if layout != "sliced":
            assert grad.stride() == x.stride()


@pytest.fixture(params=[1, 3, 31], ids="blocks{}".format)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs of that many blocks, which else only large tensors have."""
    monkeypatch.setattr(_focal_sum, "_PROGRAMS", 1)
    with _settings.override("focal_sum", BLOCKS=request.param):
        yield


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", [1, 13, 1023, 1025, 8192])
@pytest.mark.parametrize(
    ("classes", "columns"), [(1, False), (2, False), (3000, False), (2, True), (67, True)]
)
def test_few_and_many_classes(
    rows: int, classes: int, columns: bool, kernel: torch.device, rng: np.random.Generator
) -> None:
    """Rows that share a block, and rows of several blocks, ends inside and on the edges."""
    rows = min(rows, 90_000 // classes)
    x = torch.from_numpy(rng.normal(0, 3, (rows, classes))).float().to(kernel)
    x = (x.T.contiguous().T if columns else x).requires_grad_()
    t = labels_of((rows,), classes, rng).to(kernel)
    for ignore_index in (-100, classes // 2, classes):
        loss = sigmoid_focal_loss(x, t, reduction="mean", ignore_index=ignore_index)
        (grad,) = torch.autograd.grad(loss, x)
        args = numpy(x), numpy(t)
        want = reference.sigmoid_focal_loss(*args, ignore_index=ignore_index)
        want_grad = reference.sigmoid_focal_loss_grad(*args, ignore_index=ignore_index)
        assert_close(loss, want.sum() / x.numel())
        assert_close(grad, want_grad / x.numel())
        assert bool((grad[t == ignore_index] == 0).all())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("columns", [False, True])
def test_alpha_and_gamma(
    gamma: float, alpha: float | None, columns: bool, device: torch.device, rng: np.random.Generator
) -> None:
    x = torch.from_numpy(rng.normal(0, 4, (40, 50))).float().to(device)
    x = (x.mT if columns else x).requires_grad_()
    t = labels_of(tuple(x.shape[:1]), x.shape[1], rng).to(device)
    loss = sigmoid_focal_loss(x, t, alpha, gamma, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    args = numpy(x), numpy(t), alpha, gamma
    assert_close(loss, reference.sigmoid_focal_loss(*args).sum())
    assert_close(grad, reference.sigmoid_focal_loss_grad(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_logit_alone_is_accurate(dtype: torch.dtype, kernel: torch.device) -> None:
    """No error of a sum may average out: all logits are the same."""
    for value in (-80.0, -30.0, -12.0, -7.5, -4.6, -2.0, -0.3, 0.0, 0.3, 3.0, 20.0, 100.0, 1e4):
        x = torch.full((3, 50), value, dtype=dtype, device=kernel, requires_grad=True)
        for label, gamma in itertools.product((50, 7), (0.0, 2.0)):
            t = torch.full((3,), label, device=kernel)
            loss = sigmoid_focal_loss(x, t, None, gamma, reduction="sum")
            (grad,) = torch.autograd.grad(loss, x)
            args = numpy(x), numpy(t), None, gamma
            assert_close(loss, reference.sigmoid_focal_loss(*args).sum())
            assert_close(grad, reference.sigmoid_focal_loss_grad(*args))


def test_confident_and_right_costs_nothing(device: torch.device) -> None:
    """The loss of a positive is not found by taking away what it would cost as a negative."""
    x = torch.full((2000, 8), -1e4, device=device)
    t = torch.arange(2000, device=device) % 9
    x[t < 8, t[t < 8]] = 1e4
    x.requires_grad_()
    loss = sigmoid_focal_loss(x, t, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == 0
    assert bool((grad == 0).all())


def test_nan_in_an_ignored_row_does_not_leak(device: torch.device) -> None:
    x = torch.randn(3000, 5, device=device)
    t = torch.full((3000,), 5, device=device)
    t[::7] = -100
    clean = sigmoid_focal_loss(x, t, reduction="sum")
    for columns in (False, True):
        y = x.clone()
        y[::7] = float("nan")
        y = (y.mT.contiguous().mT if columns else y).requires_grad_()
        loss = sigmoid_focal_loss(y, t, reduction="sum")
        (grad,) = torch.autograd.grad(loss, y)
        torch.testing.assert_close(loss, clean)
        assert bool((grad[::7] == 0).all())
        assert bool(grad.isfinite().all())


def test_divisors_on_the_device(device: torch.device) -> None:
    x = torch.randn(50, 9, device=device, requires_grad=True)
    t = torch.arange(50, device=device) % 10
    t[3] = -100
    want = torch.autograd.grad(sigmoid_focal_loss(x, t, reduction="sum"), x)[0] / 7
    for avg_factor in (7, torch.tensor(7, device=device), torch.tensor([7.0], device=device)):
        loss = sigmoid_focal_loss(x, t, reduction="mean", avg_factor=avg_factor)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want)
    loss = sigmoid_focal_loss(x, t, reduction="mean", avg_factor=torch.zeros(1, device=device))
    (grad,) = torch.autograd.grad(loss, x)
    assert bool(loss.isinf())
    assert bool(grad[0].isinf().all())
    assert bool((grad[3] == 0).all())


# ---- levels


@pytest.mark.parametrize("form", ["labels", "weighted", "soft"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_levels_are_their_concatenation(
    form: str, reduction: Any, device: torch.device, rng: np.random.Generator
) -> None:
    heads = [torch.from_numpy(rng.normal(size=(2, 3 * 5, s, s))).float() for s in (1, 3, 12)]
    heads = [h.to(device).requires_grad_() for h in heads]
    levels = [h.unflatten(1, (3, 5)).permute(0, 3, 4, 1, 2) for h in heads]
    flat = torch.cat([x.reshape(-1, 5) for x in levels])
    targets = [labels_of(tuple(x.shape[:-1]), 5, rng).to(device) for x in levels]
    weights = None
    if form == "soft":
        targets = [torch.rand_like(x) for x in levels]
    if form == "weighted":
        weights = [torch.rand(x.shape[:-1], device=device) for x in levels]
    got = sigmoid_focal_loss(levels, targets, reduction=reduction, weight=weights)
    last = [1] if form == "soft" else []
    joined = torch.cat([t.reshape(-1, *(5 for _ in last)) for t in targets])
    joined_weights = None if weights is None else torch.cat([w.flatten() for w in weights])
    want = sigmoid_focal_loss(flat, joined, reduction=reduction, weight=joined_weights)
    if reduction == "none":
        got = torch.cat([x.reshape(-1, 5) for x in got])
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sum(), heads, retain_graph=True),
        torch.autograd.grad(want.sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "inputs must be a tensor or a list of at least one, got an empty list"),
        ({"targets": torch.zeros(4)}, "targets must be a list of 2 tensors.*got Tensor"),
        ({"targets": [torch.zeros(4, 3)]}, "targets must be a list of 2 tensors.*got 1"),
        ({"weight": torch.zeros(4)}, "weight must be a list of 2 tensors.*got Tensor"),
        ({"targets": [torch.zeros(4, 3), torch.zeros(5, 3)]}, r"dense targets\[1\] must have"),
        (
            {"inputs": [torch.zeros(4, 3), torch.zeros(4, 3).half()]},
            r"inputs\[1\] must have the dtype.*got torch.float16",
        ),
    ],
)
def test_rejected_levels(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "inputs": [torch.zeros(4, 3), torch.zeros(4, 3)],
        "targets": [torch.zeros(4, 3), torch.zeros(4, 3)],
    }
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(**(arguments | change))


# ---- the gradient that came with the loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 3.0, float("inf")])
def test_backward_twice_is_bitwise_the_same(
    dtype: torch.dtype, upstream: float, device: torch.device
) -> None:
    x = torch.randn(70, 30, device=device, dtype=dtype, requires_grad=True)
    t = torch.arange(70, device=device) % 40
    t[5] = -100
    loss = sigmoid_focal_loss(x, t, reduction="mean", avg_factor=5)
    g = torch.tensor(upstream, device=device)
    first, second, third = (torch.autograd.grad(loss, x, g, retain_graph=True)[0] for _ in range(3))
    kept = first.clone()
    assert torch.equal(first, second)
    second.zero_()  # a caller's own
    assert torch.equal(first, third)
    assert torch.equal(first, kept)
    assert bool((first[5] == 0).all())
    other = torch.autograd.grad(loss, x, torch.tensor(2.0, device=device))[0]
    assert not torch.equal(first, other)
    assert torch.equal(first, kept)


def test_small_gradients_survive_a_grad_scaler(device: torch.device) -> None:
    """In fp16, where the unscaled gradient, about 1e-9, would be 0."""
    x = torch.full((4, 5), -3.0, dtype=torch.float16, device=device, requires_grad=True)
    t = torch.full((4,), 5, device=device)
    loss = sigmoid_focal_loss(x, t, reduction="mean", avg_factor=1e5)
    (grad,) = torch.autograd.grad(loss * 2.0**16, x)
    want = reference.sigmoid_focal_loss_grad(numpy(x), numpy(t)) / 1e5 * 2**16
    assert_close(grad, want)


def test_no_gradient_is_computed_for_nobody(kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    x = torch.zeros(100, 80, dtype=torch.bfloat16)
    t = torch.full((100,), 80)
    leaf = x.clone().requires_grad_()
    with traffic() as meter:
        sigmoid_focal_loss(x, t, reduction="sum")
        with torch.no_grad():
            sigmoid_focal_loss(leaf, t, reduction="sum")
    assert meter.stored < 1000


@pytest.mark.parametrize("columns", [False, True])
def test_traffic(columns: bool, kernel: torch.device) -> None:
    """Distinct sectors of 32 bytes, N x 80 logits in bf16 and int64 labels."""
    if kernel.type != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    n, c = 1600, 80
    x = torch.zeros((c, n) if columns else (n, c), dtype=torch.bfloat16)
    x = (x.mT if columns else x).requires_grad_()
    t = torch.full((n,), c)
    t[::100] = 3
    t[50::100] = -100
    forward, both = n * c * 2 + 8 * n, 2 * n * c * 2 + 8 * n

    def moved(upstream: float | None) -> int:
        with traffic(sectors=True) as meter, torch.set_grad_enabled(upstream is not None):
            loss = sigmoid_focal_loss(x, t, reduction="sum")
            if upstream is not None:
                loss.backward(torch.tensor(upstream))
        return meter.dram

    assert forward <= moved(None) <= 1.03 * forward
    assert both <= moved(1.0) <= 1.03 * both
    assert moved(3.0) <= 2.05 * both


def test_launches_of_levels(kernel: torch.device) -> None:
    levels = [torch.zeros(n, 8, device=kernel, requires_grad=True) for n in (30, 20)]
    targets = [torch.zeros(n, dtype=torch.long, device=kernel) for n in (30, 20)]
    with host_cost() as cost:
        loss = sigmoid_focal_loss(levels, targets, reduction="sum")
        loss.backward()
    assert cost.launches == ["focal_rows_kernel"] * 2 + ["scale_kernel"] * 2
    assert cost.synchronisations == []


# ---- determinism


@pytest.mark.parametrize("columns", [False, True])
def test_order_of_64_programs_does_not_matter(columns: bool, kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    shape = (2, 40, 1100) if columns else (2048, 80)
    x = torch.randn(shape, dtype=torch.float32)
    x = (x.mT if columns else x).requires_grad_()
    t = torch.randint(0, 2000, x.shape[:-1])

    def run() -> list[Tensor]:
        with traffic() as meter:
            loss = sigmoid_focal_loss(x, t, reduction="sum")
            grads = torch.autograd.grad(loss, x)
        assert meter.programs >= 64
        return [loss, *grads]

    want = run()
    for order in (shuffled(1), shuffled(2), reversed_programs()):
        with order:
            got = run()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the code for NVIDIA's GPUs


def test_inline_ptx_says_the_same(
    kernel: torch.device, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Its instructions, run in numpy, against the portable form."""
    if kernel.type != "cpu":
        pytest.skip("a GPU of NVIDIA's runs the PTX in every test")
    values = np.concatenate([rng.normal(0, 5, 4000), [1e4, -1e4, -90, -1e38, 3e38, 0, -0.0, 88.5]])
    for dtype in DTYPES[1:]:
        x = torch.from_numpy(values).to(dtype).view(-1, 8).requires_grad_()
        t = labels_of((len(x),), 8, rng)
        found = []
        for ptx in (False, True):
            monkeypatch.setattr(_dispatch, "inline_ptx", lambda device, ptx=ptx: ptx)
            loss = sigmoid_focal_loss(x, t, reduction="sum")
            found.append((loss, *torch.autograd.grad(loss, x)))
        for portable, inline in zip(*found, strict=True):
            assert_close(inline, numpy(portable))
