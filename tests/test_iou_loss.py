"""GIoU, DIoU and CIoU losses: the reference against outside facts, the kernels against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlops_triton import (
    _settings,
    complete_box_iou,
    complete_box_iou_loss,
    distance_box_iou,
    distance_box_iou_loss,
    generalized_box_iou,
    generalized_box_iou_loss,
)
from dlops_triton.reference import iou_loss as reference
from tests import peers
from tests.arrays import numpy
from tests.textbook_iou import KINDS, boxes, similarity
from tests.tolerances import assert_close
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import shuffled

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Around the blocks of 256 forward and 128 backward.
SHAPES = [(0,), (1,), (3, 0), (), (127,), (2, 64), (3, 43), (255,), (256,), (257,)]
REDUCTIONS = ["none", "mean", "sum"]
OPS: dict[str, Callable[..., Tensor]] = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}


def textbook(a: Tensor, b: Tensor, kind: str, eps: float = 1e-7) -> Tensor:
    return 1 - similarity(a, b, kind, eps, loss=True)


# ---- the reference, pinned from outside


def test_reference_by_hand() -> None:
    a = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 4, 0], [5, 5, 5, 5]])
    b = np.array([[1, 1, 3, 3], [0, 0, 2, 1], [4, 0, 6, 2], [0, 0, 4, 4], [5, 5, 5, 5]])
    v = 4 / math.pi**2 * (math.atan(2) - math.pi / 4) ** 2
    want = {
        "giou": [1 - 1 / 7 + 2 / 9, 1 / 2, 4 / 3, 1, 1],
        "diou": [1 - 1 / 7 + 1 / 9, 1 / 2 + 1 / 32, 7 / 5, 9 / 8, 1],
        "ciou": [1 - 1 / 7 + 1 / 9, 1 / 2 + 1 / 32 + v * v / (1 / 2 + v), 7 / 5, 9 / 8 + 0.05, 1],
    }
    for kind in KINDS:
        np.testing.assert_allclose(reference.iou_loss(a, b, kind, eps=0), want[kind], rtol=1e-14)
    # Where eps goes: I = 1, U = 7; C = 9; c^2 = 18, d^2 = 2.
    eps = 0.5
    got = [reference.iou_loss(a[:1], b[:1], kind, eps=eps)[0] for kind in KINDS]
    iou = 1 / 7.5
    np.testing.assert_allclose(
        got, [1 - iou + 2 / 9.5, 1 - iou + 2 / 18.5, 1 - iou + 2 / 18.5], rtol=1e-14
    )
    got = reference.iou_loss(a[1:2], b[1:2], "ciou", eps=eps)
    iou = 2 / 4.5
    want_ciou = 1 - iou + 0.25 / 8.5 + v * v / (1 - iou + v + eps)
    np.testing.assert_allclose(got, [want_ciou], rtol=1e-14)


@pytest.mark.parametrize(("case", "arrays"), peers.cases("iou_loss"))
@pytest.mark.parametrize("kind", KINDS)
def test_reference_agrees_with_the_peers(kind: str, case: Any, arrays: dict[str, Any]) -> None:
    a, b = arrays["pred"], arrays["target"]
    np.testing.assert_allclose(reference.iou_loss(a, b, kind), arrays[kind], rtol=1e-12, atol=1e-15)
    got = reference.iou_loss_grad(a, b, arrays["grad_out"], kind)
    for x, side in zip(got, ("pred", "target"), strict=True):
        # Where boxes are equal, terms of the size of 1 / side cancel.
        atol = 1e-14 / np.abs(a).max()
        np.testing.assert_allclose(x, arrays[f"{kind}.grad_{side}"], rtol=1e-11, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-7, 0.5])
def test_reference_gradient_is_torchs(kind: str, eps: float, rng: np.random.Generator) -> None:
    # Integer corners in a small range: plenty of ties, touching and identical boxes; some inside
    # out; without height only where no angle is taken and no slope is 1 / 1e-7.
    least = int(kind == "ciou" or eps < 0.1)
    a, b = (boxes(rng, 3, 300, size=6, least=least, span=4) for _ in range(2))
    a[:, :20] = b[:, :20]
    a[:, 20:40] = a[:, 20:40, [2, 3, 0, 1]]
    b[:, 30:50] = b[:, 30:50, [2, 1, 0, 3]]
    a, b = a.requires_grad_(), b.requires_grad_()
    g = torch.from_numpy(rng.normal(size=(3, 300)))
    loss = textbook(a, b, kind, eps)
    want = torch.autograd.grad((g * loss).sum(), (a, b))
    np.testing.assert_allclose(
        reference.iou_loss(numpy(a), numpy(b), kind, eps=eps), numpy(loss), rtol=1e-12, atol=1e-14
    )
    got = reference.iou_loss_grad(numpy(a), numpy(b), numpy(g), kind, eps=eps)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, numpy(y), rtol=1e-9, atol=1e-12)


# ---- the op against the reference


def inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Pairs with areas, of which many overlap, some are equal, some share an edge."""
    a = boxes(rng, *shape, least=10)
    b = a + torch.from_numpy(rng.integers(-4, 5, (*shape, 4)) * rng.integers(0, 2, (*shape, 1)))
    b += torch.from_numpy(rng.integers(0, 40, (*shape, 1)) * rng.integers(0, 2, (*shape, 1)))
    return [a.to(dtype), b.to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    kind: str,
    device: torch.device,
    rng: np.random.Generator,
) -> None:
    a, b = (x.to(device).requires_grad_() for x in inputs(rng, shape, dtype))
    for reduction in REDUCTIONS:
        loss = OPS[kind](a, b, reduction)
        each = reference.iou_loss(numpy(a), numpy(b), kind)
        # The IoU and its penalties, each of them about 1, cancel.
        if reduction == "none":
            assert loss.dtype == dtype
            assert_close(loss, each, scale=2)
            g = torch.from_numpy(rng.normal(size=shape)).to(dtype).to(device)
            weights = numpy(g)
        else:
            assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
            count = max(each.size, 1) if reduction == "mean" else 1
            assert_close(loss, each.sum() / count, scale=2 * each.size / count)
            g = torch.tensor(0.75, dtype=loss.dtype, device=device)
            weights = np.full(shape, 0.75 / count)
        got = torch.autograd.grad(loss, (a, b), g)
        want = reference.iou_loss_grad(numpy(a), numpy(b), weights, kind)
        for x, y in zip(got, want, strict=True):
            assert x.dtype == dtype
            # Sides are integers, so that no slope is much above 1.
            assert_close(x, y, scale=np.broadcast_to(np.abs(weights)[..., None], y.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps(kind: str, eps: float, device: torch.device, rng: np.random.Generator) -> None:
    a, b = inputs(rng, (60,), torch.float64)
    a[:9] = b[:9] = boxes(rng, 9, size=2)  # also points and lines
    a, b = (x.to(device).requires_grad_() for x in (a, b))
    loss = OPS[kind](a, b, eps=eps)
    want = reference.iou_loss(numpy(a), numpy(b), kind, eps=eps)
    assert not np.isnan(want).any()
    assert_close(loss, want, scale=2)
    grads = reference.iou_loss_grad(numpy(a), numpy(b), np.ones(60), kind, eps=eps)
    for x, y in zip(torch.autograd.grad(loss.sum(), (a, b)), grads, strict=True):
        assert_close(x, y, scale=1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_minus_the_pairwise_value(kind: str, device: torch.device) -> None:
    rng = np.random.default_rng(1)
    a, b = (x.to(device) for x in inputs(rng, (50,), torch.float64))
    pairwise = {
        "giou": generalized_box_iou,
        "diou": distance_box_iou,
        "ciou": complete_box_iou,
    }[kind]
    loss = OPS[kind](a, b)
    solid = ((a[:, 2:] > a[:, :2]) & (b[:, 2:] > b[:, :2])).all(1)
    assert int(solid.sum()) > 30
    want = 1 - pairwise(a, b).diagonal()
    torch.testing.assert_close(loss[solid], want[solid], rtol=0, atol=1e-6)  # eps


@pytest.mark.parametrize("kind", KINDS)
def test_equal_boxes_cost_nothing(kind: str, device: torch.device) -> None:
    """Nor less than nothing, at eps that fp32 does not see beside an area."""
    rng = np.random.default_rng(1)
    a = torch.from_numpy((rng.random((300, 4)) * 100).astype(np.float32)).to(device)
    a[:, 2:] += a[:, :2] + 3
    assert OPS[kind](a, a).abs().max().item() <= 2e-7
    assert OPS[kind](a, a).min().item() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric(kind: str, device: torch.device, rng: np.random.Generator) -> None:
    a, b = (x.to(device).requires_grad_() for x in inputs(rng, (200,), torch.float32))
    loss, mirrored = OPS[kind](a, b), OPS[kind](b, a)
    assert torch.equal(loss, mirrored)
    for x, y in zip(
        torch.autograd.grad(loss.sum(), (a, b)),
        torch.autograd.grad(mirrored.sum(), (a, b)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)


def test_sums_over_many_programs(kernel: torch.device, rng: np.random.Generator) -> None:
    a, b = (x.to(kernel).requires_grad_() for x in inputs(rng, (1100,), torch.float32))
    with (
        _settings.override("iou_loss_fwd", BLOCK=1, num_warps=1) as fwd,
        _settings.override("iou_loss_bwd", BLOCK=64, num_warps=1) as bwd,
    ):
        loss = complete_box_iou_loss(a, b, "mean")
        got = torch.autograd.grad(loss, (a, b))
    assert (fwd.launches, bwd.launches) == (1, 1)
    assert_close(loss, reference.iou_loss(numpy(a), numpy(b), "ciou").mean(), scale=2)
    want = reference.iou_loss_grad(numpy(a), numpy(b), np.full(1100, 1 / 1100), "ciou")
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, scale=1 / 1100)


# ---- bad data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_pairs_spoil_no_others(kind: str, reduction: str, device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    box = [0.0, 0, 10, 10]
    bad = [[nan, 0, 1, 1], [0, 0, inf, inf], [-inf, -inf, inf, inf], [0, 0, nan, nan]]
    degenerate = [[3.0, 3, 3, 3], [9, 9, 1, 1], [0, 5, 10, 5], [5, 0, 5, 10]]
    a = torch.tensor([[1.0, 2, 9, 12], *bad, *degenerate], device=device, requires_grad=True)
    b = torch.tensor([box] * 9, device=device, requires_grad=True)
    loss = OPS[kind](a, b, reduction)
    each = OPS[kind](a, b)
    assert each.isnan().tolist() == [False] + [True] * 4 + [False] * 4
    if reduction == "none":
        assert torch.equal(loss.isnan(), each.isnan())
        loss = loss.nansum()
    else:
        assert bool(loss.isnan())
    d1, d2 = torch.autograd.grad(loss, (a, b), torch.ones_like(loss))
    for d in (d1, d2):
        assert bool(d.isfinite().all())
        assert d[1:5].abs().sum().item() == 0
        assert bool((d[0] != 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_points_have_a_loss_and_a_gradient(kind: str, device: torch.device) -> None:
    points = torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 0]], device=device)
    a = points.requires_grad_()
    b = torch.tensor([[5.0, 5, 5, 5], [3, 4, 3, 4]], device=device)
    loss = OPS[kind](a, b)
    torch.testing.assert_close(loss, torch.tensor([1.0, 2], device=device))
    (grad,) = torch.autograd.grad(loss.sum(), a)
    assert grad.isfinite().all()


# ---- behaviour inside torch


def close_boxes(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    corner = torch.from_numpy(rng.random((2, 5, 2)) * 10)
    a = torch.cat([corner, corner + 3 + torch.from_numpy(rng.random((2, 5, 2)))], -1)
    return a, a + torch.from_numpy(rng.normal(size=(2, 5, 4))) * 0.7


@pytest.mark.parametrize("kind", ["giou", "diou"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(
    kind: str, reduction: str, device: torch.device, rng: np.random.Generator
) -> None:
    a, b = (x.to(device).requires_grad_() for x in close_boxes(rng))
    assert torch.autograd.gradcheck(lambda a, b: OPS[kind](a, b, reduction), (a, b), fast_mode=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_ciou_is_torchs(
    reduction: str, device: torch.device, rng: np.random.Generator
) -> None:
    """Finite differences would see alpha, through which no gradient flows."""
    a, b = (x.to(device).requires_grad_() for x in close_boxes(rng))
    loss, want = complete_box_iou_loss(a, b, reduction), textbook(a, b, "ciou")
    if reduction != "none":
        want = getattr(want, reduction)()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    g = torch.from_numpy(rng.normal(size=tuple(loss.shape))).to(device)
    for x, y in zip(
        torch.autograd.grad(loss, (a, b), g), torch.autograd.grad(want, (a, b), g), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_only_the_needed_gradients(
    side: int, device: torch.device, rng: np.random.Generator
) -> None:
    arguments = [x.to(device) for x in inputs(rng, (50,), torch.float32)]
    both = [x.clone().requires_grad_() for x in arguments]
    arguments[side].requires_grad_()
    loss = complete_box_iou_loss(*arguments, "sum")
    with host_cost() as cost:
        (grad,) = torch.autograd.grad(loss, arguments[side])
    assert len(cost.launches) <= 1
    want = torch.autograd.grad(complete_box_iou_loss(*both, "sum"), both)[side]
    assert torch.equal(grad, want)


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str, device: torch.device, rng: np.random.Generator) -> None:
    wide = boxes(rng, 6, 20).to(device).mT.contiguous().mT[:, ::2]
    one = boxes(rng, 1).to(device).expand(6, 10, 4)
    a, b = (x.detach().requires_grad_() for x in (wide, one))
    c, d = (x.detach().clone(memory_format=torch.contiguous_format) for x in (wide, one))
    c.requires_grad_()
    d.requires_grad_()
    got, want = OPS[kind](a, b), OPS[kind](c, d)
    assert torch.equal(got, want)
    strided = torch.from_numpy(rng.normal(size=(10, 6))).to(device).mT
    for g in (strided, strided[:1, :1].expand(6, 10), strided[:, :1].expand(6, 10)):
        for x, y in zip(
            torch.autograd.grad(got, (a, b), g, retain_graph=True),
            torch.autograd.grad(want, (c, d), g.contiguous(), retain_graph=True),
            strict=True,
        ):
            assert torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_and_double_backward(
    kind: str, reduction: str, device: torch.device, rng: np.random.Generator
) -> None:
    a, b = (x.to(device) for x in inputs(rng, (9,), torch.float32))
    a.requires_grad_()
    total = OPS[kind](a, b, reduction).sum()
    first, second = (torch.autograd.grad(total, a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(total, a, create_graph=True)
    message = f"{OPS[kind].__name__} can be differentiated once only"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


def test_order_of_programs_does_not_matter(kernel: torch.device, rng: np.random.Generator) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    a, b = (x.requires_grad_() for x in inputs(rng, (2000,), torch.float32))

    def run() -> list[Tensor]:
        losses = [complete_box_iou_loss(a, b, reduction) for reduction in REDUCTIONS]
        return [*losses, *torch.autograd.grad(losses[0].sum() + losses[1], (a, b))]

    want = run()
    for seed in (1, 2):
        with shuffled(seed):
            got = run()
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes1": [[0, 0, 1, 1]]}, TypeError, "boxes1 must be a torch.Tensor, got list"),
        ({"boxes1": torch.zeros(())}, ValueError, r"boxes1 must have shape .*got \(\)"),
        ({"boxes2": torch.zeros(2, 5)}, ValueError, r"boxes2 must have shape .*got \(2, 5\)"),
        ({"boxes2": torch.zeros(2, 4).long()}, TypeError, "boxes2 .*torch.int64"),
        ({"boxes2": torch.zeros(2, 4).double()}, TypeError, "dtype of boxes1, torch.float32, got"),
        ({"boxes2": torch.zeros(1, 4)}, ValueError, r"shape of boxes1, \(2, 4\), got \(1, 4\)"),
        ({"boxes2": torch.zeros(2, 4, device="meta")}, ValueError, "device of boxes1, cpu, got"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0 and finite, got -1.0"),
        ({"eps": float("inf")}, ValueError, "eps must be at least 0 and finite, got inf"),
        ({"eps": None}, TypeError, "eps must be a number at least 0 and finite, got NoneType"),
    ],
)
def test_rejected(kind: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"boxes1": torch.zeros(2, 4), "boxes2": torch.zeros(2, 4)}
    with pytest.raises(error, match=message):
        OPS[kind](**(arguments | change))
