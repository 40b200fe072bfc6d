"""Pairwise GIoU, DIoU and CIoU: the reference against outside facts, the kernels against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlops_triton import (
    _settings,
    box_iou,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
)
from dlops_triton.kernels._math import atan_ratio
from dlops_triton.reference import iou as reference
from tests import peers
from tests.arrays import numpy
from tests.textbook_iou import KINDS, boxes, similarity
from tests.tolerances import assert_close
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import shuffled

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Around the tiles of 16 x 64 forward and 16 x 32 backward.
SHAPES = [(0, 3), (3, 0), (1, 1), (15, 63), (16, 64), (17, 65), (65, 40)]
OPS: dict[str, Callable[..., Tensor]] = {
    "giou": generalized_box_iou,
    "diou": distance_box_iou,
    "ciou": complete_box_iou,
}
EPS = {"giou": 0.0, "diou": 1e-7, "ciou": 1e-7}

# The hull of two of these has no side above 0.
INSIDE_OUT = torch.tensor([[9, 8, 1, 2], [8, 8, 2, 5], [7, 5, 4, 1]]).double()


def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a[..., :, None, :], b[..., None, :, :]


# ---- the reference, pinned from outside


def test_reference_by_hand() -> None:
    a = np.array([[0, 0, 2, 2], [5, 5, 5, 5]])
    b = np.array([[1, 1, 3, 3], [0, 0, 2, 1], [4, 0, 6, 2], [5, 5, 5, 5], [9, 9, 9, 9]])
    giou = reference.box_penalized(a, b, "giou")
    np.testing.assert_allclose(giou[0, :3], [1 / 7 - 2 / 9, 1 / 2, -1 / 3], rtol=1e-15)
    assert giou[1, 3:].tolist() == [0, -1]  # a hull of 0 is no penalty
    diou = reference.box_penalized(a, b, "diou")
    np.testing.assert_allclose(diou[0, :3], [1 / 7 - 1 / 9, 1 / 2 - 1 / 32, -2 / 5], rtol=1e-15)
    assert diou[1, 3:].tolist() == [0, -1]
    ciou = reference.box_penalized(a, b, "ciou")
    v = 4 / math.pi**2 * (math.atan(2) - math.pi / 4) ** 2
    want = [1 / 7 - 1 / 9, 1 / 2 - 1 / 32 - v * v / (1 / 2 + v), -2 / 5]
    np.testing.assert_allclose(ciou[0, :3], want, rtol=1e-14)
    assert ciou[1, 3:].tolist() == [0, -1]  # points have the angle 0
    line, square = np.array([[0, 0, 4, 0]]), np.array([[0, 0, 4, 4]])
    np.testing.assert_allclose(
        reference.box_penalized(line, square, "ciou"), [[-1 / 8 - 1 / 4 * 1 / 5]], rtol=1e-14
    )


@pytest.mark.parametrize(("case", "arrays"), peers.cases("box_iou"))
def test_reference_agrees_with_the_peers(case: Any, arrays: dict[str, Any]) -> None:
    for kind in KINDS:
        if kind in arrays:
            got = reference.box_penalized(arrays["boxes1"], arrays["boxes2"], kind, eps=EPS[kind])
            np.testing.assert_allclose(got, arrays[kind], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 1])
def test_reference_gradient_is_torchs(kind: str, offset: int, rng: np.random.Generator) -> None:
    # Integer corners in a small range: plenty of ties, touching and identical boxes; without
    # height only where the offset gives some, or where no angle is taken.
    least = int(kind == "ciou" and offset == 0)
    a, b = (boxes(rng, 3, n, size=9, least=least, span=9) for n in (30, 25))
    a[:, :5] = b[:, :5]
    a[:, 5:8], b[:, 5:7] = INSIDE_OUT, INSIDE_OUT[1:] + 1
    a, b = a.requires_grad_(), b.requires_grad_()
    g = torch.from_numpy(rng.normal(size=(3, 30, 25)))
    value = similarity(*pairs(a, b), kind, EPS[kind], offset)
    want = torch.autograd.grad((g * value).sum(), (a, b))
    arrays = numpy(a), numpy(b)
    options: Any = {"offset": offset, "eps": EPS[kind]}
    np.testing.assert_allclose(
        reference.box_penalized(*arrays, kind, **options), numpy(value), rtol=1e-12, atol=1e-15
    )
    got = reference.box_penalized_grad(*arrays, numpy(g), kind, **options)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, numpy(y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_offset_is_a_pixel_at_the_far_edges(kind: str, rng: np.random.Generator) -> None:
    a, b = (numpy(boxes(rng, n, size=9, span=9)) for n in (20, 30))
    g = rng.normal(size=(20, 30))
    far = np.array([0, 0, 1, 1])
    got = reference.box_penalized_grad(a, b, g, kind, offset=1, eps=1e-7)
    want = reference.box_penalized_grad(a + far, b + far, g, kind, eps=1e-7)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


# ---- the angle


@triton.jit
def atan_kernel(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < n, other=0)
    b = tl.load(b_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + at, atan_ratio(a, b), mask=at < n)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 2.5e-7), (torch.float64, 6e-16)], ids=str
)
def test_atan(
    dtype: torch.dtype, error: float, kernel: torch.device, rng: np.random.Generator
) -> None:
    exponent = 30 if dtype == torch.float32 else 250
    ratio = np.concatenate(
        [np.linspace(-4, 4, 20_001), 10 ** rng.uniform(-exponent, exponent, 9999)]
    )
    b = rng.uniform(0.5, 2, ratio.size) * rng.choice([-1, 1], ratio.size)
    a = torch.from_numpy(ratio * b).to(dtype).to(kernel)
    below = torch.from_numpy(b).to(dtype).to(kernel)
    out = torch.empty_like(a)
    n = a.numel()
    atan_kernel[(triton.cdiv(n, 1024),)](a, below, out, n, BLOCK=1024)
    exact = np.longdouble if dtype == torch.float64 else np.float64
    want = np.arctan(numpy(a).astype(exact) / numpy(below).astype(exact))
    np.testing.assert_allclose(numpy(out), want.astype(np.float64), rtol=error)


def test_atan_of_limits(kernel: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([0.0, 3, -3, 3, 0, inf, -inf, 3, inf, nan, 1], device=kernel)
    b = torch.tensor([0.0, 0, 0, -3, 3, 3, 3, inf, inf, 1, nan], device=kernel)
    out = torch.empty_like(a)
    atan_kernel[(1,)](a, b, out, a.numel(), BLOCK=16)
    half = math.pi / 2
    want = [0, half, -half, -half / 2, 0, half, -half, 0, nan, nan, nan]
    np.testing.assert_allclose(out.cpu().numpy(), np.array(want), rtol=2.5e-7)


# ---- the op against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, int],
    kind: str,
    kernel: torch.device,
    rng: np.random.Generator,
) -> None:
    n, m = shape
    a = boxes(rng, n).to(dtype).to(kernel).requires_grad_()
    b = boxes(rng, m).to(dtype).to(kernel).requires_grad_()
    g = torch.from_numpy(rng.normal(size=shape)).to(dtype).to(kernel)
    value = OPS[kind](a, b)
    value.backward(g)
    assert value.dtype == dtype
    # The IoU and its penalties, each of them at most 1, cancel.
    want = reference.box_penalized(numpy(a), numpy(b), kind, eps=EPS[kind])
    assert_close(value, want, scale=1)
    grads = reference.box_penalized_grad(numpy(a), numpy(b), numpy(g), kind, eps=EPS[kind])
    for x, y, axis in zip((a, b), grads, (1, 0), strict=True):
        assert x.grad is not None
        # Sides are integers, so that no slope is much above 1. The sums cancel.
        assert_close(x.grad, y, scale=np.abs(numpy(g)).sum(axis)[:, None])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_offset(
    offset: Literal[0, 1], kind: str, device: torch.device, rng: np.random.Generator
) -> None:
    a, b = (boxes(rng, 2, 3, n) for n in (20, 33))
    a[..., :3, :], b[..., -2:, :] = INSIDE_OUT, INSIDE_OUT[1:] + 1
    a, b = (x.to(device).requires_grad_() for x in (a, b))
    value = OPS[kind](a, b, offset=offset)
    g = torch.from_numpy(rng.normal(size=(2, 3, 20, 33))).to(device)
    value.backward(g)
    options: Any = {"offset": offset, "eps": EPS[kind]}
    want = reference.box_penalized(numpy(a), numpy(b), kind, **options)
    assert_close(value, want, scale=1)
    grads = reference.box_penalized_grad(numpy(a), numpy(b), numpy(g), kind, **options)
    for x, y in zip((a, b), grads, strict=True):
        assert x.grad is not None
        assert_close(x.grad, y, scale=10)


@pytest.mark.parametrize("kind", ["diou", "ciou"])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps(kind: str, eps: float, device: torch.device, rng: np.random.Generator) -> None:
    a = boxes(rng, 20, size=9, span=9).to(device).requires_grad_()
    b = torch.cat([a[:7], boxes(rng, 9, size=9, span=9).to(device)]).detach().requires_grad_()
    value = OPS[kind](a, b, eps)
    value.sum().backward()
    want = reference.box_penalized(numpy(a), numpy(b), kind, eps=eps)
    assert not np.isnan(want).any()  # also of a point with itself
    assert_close(value, want, scale=1)
    ones = np.ones(want.shape)
    grads = reference.box_penalized_grad(numpy(a), numpy(b), ones, kind, eps=eps)
    for x, y in zip((a, b), grads, strict=True):
        assert x.grad is not None
        assert_close(x.grad, y, scale=20)


@pytest.mark.parametrize("programs", [1, 6])
def test_gradients_over_several_blocks_and_splits(
    programs: int, kernel: torch.device, rng: np.random.Generator
) -> None:
    a = boxes(rng, 20).to(kernel).requires_grad_()
    b = boxes(rng, 150).to(kernel).requires_grad_()
    g = torch.from_numpy(rng.normal(size=(20, 150))).to(kernel)
    with _settings.override("iou_penalty_bwd", programs=programs) as used:
        complete_box_iou(a, b).backward(g)
    assert used.launches == 2
    want = reference.box_penalized_grad(numpy(a), numpy(b), numpy(g), "ciou", eps=1e-7)
    for x, y in zip((a, b), want, strict=True):
        assert x.grad is not None
        assert_close(x.grad, y, scale=10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_with_itself_is_exactly_1(
    kind: str, device: torch.device, rng: np.random.Generator
) -> None:
    a = torch.from_numpy((rng.random((70, 4)) * 100).astype(np.float32)).to(device)
    a[:, 2:] += a[:, :2] + 1
    value = OPS[kind](a, a)
    assert torch.equal(value.diagonal(), torch.ones(70, device=device))


# ---- properties


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), m=st.integers(1, 12))
def test_symmetric_and_below_the_iou(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = boxes(rng, n).float(), boxes(rng, m).float()
    iou = box_iou(a, b)
    values = {kind: op(a, b) for kind, op in OPS.items()}
    for kind, value in values.items():
        assert torch.equal(value, OPS[kind](b, a).mT)
        assert bool(((value <= iou) & (value >= -2)).all())
    assert bool((values["ciou"] <= values["diou"]).all())
    assert bool((values["giou"] >= -1).all())


# ---- bad data


@pytest.mark.parametrize("kind", KINDS)
def test_bad_boxes_stay_among_themselves(kind: str, device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    good = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15]], device=device)
    bad = torch.tensor(
        [[nan, nan, 10, 10], [0, 0, inf, inf], [3, 3, 3, 3], [9, 9, 1, 1], [-inf, -inf, 5, 5]],
        device=device,
    )
    a = torch.cat([good, bad]).requires_grad_()
    value = OPS[kind](a, a)
    assert value[0].isnan().tolist() == [False, False, True, True, False, False, True]
    assert bool(value[2].isnan().all())
    assert bool(value[3].isnan().all())
    assert value[4, 4].item() == 0  # a point with itself
    value.nan_to_num(0).sum().backward()
    assert a.grad is not None
    assert bool(a.grad.isfinite().all())
    # The points beside the bad boxes change nothing.
    b = a.detach()[[0, 1, 4, 5]].requires_grad_()
    OPS[kind](b, b).sum().backward()
    assert b.grad is not None
    torch.testing.assert_close(a.grad[[0, 1, 4, 5]], b.grad)
    assert a.grad[[2, 3, 6]].abs().sum().item() == 0


def test_apart_boxes_are_drawn_together(device: torch.device) -> None:
    """Where the IoU has no gradient, as of points, the penalty has."""
    a = torch.tensor([[0.0, 0, 0, 0]], device=device, requires_grad=True)
    b = torch.tensor([[3.0, 4, 3, 4]], device=device)
    value = distance_box_iou(a, b)
    (grad,) = torch.autograd.grad(value, a)
    assert value.item() == -1
    # The diagonal grows with the distance: the point would rather grow than move.
    want = torch.tensor([[-3, -4, 3, 4]], device=device) / 25
    torch.testing.assert_close(grad, want)
    c = torch.tensor([[0.0, 0, 2, 2]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(distance_box_iou(c, b), c)
    assert bool((grad[0, 2:] > 0).all())
    (grad,) = torch.autograd.grad(generalized_box_iou(c, b), c)
    assert bool((grad[0, 2:] > 0).all())


# ---- behaviour inside torch


def close_boxes(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    corner = torch.from_numpy(rng.random((2, 5, 2)) * 10)
    a = torch.cat([corner, corner + 3 + torch.from_numpy(rng.random((2, 5, 2)))], -1)
    return a, a.flip(-2)[:, :4] + 0.31


@pytest.mark.parametrize("kind", ["giou", "diou"])
def test_gradcheck(kind: str, device: torch.device, rng: np.random.Generator) -> None:
    a, b = (x.to(device).requires_grad_() for x in close_boxes(rng))
    for offset in (0, 1):
        assert torch.autograd.gradcheck(
            lambda a, b, o=offset: OPS[kind](a, b, offset=o), (a, b), fast_mode=True
        )


def test_gradient_of_ciou_is_torchs(device: torch.device, rng: np.random.Generator) -> None:
    """Finite differences would see alpha, through which no gradient flows."""
    a, b = (x.to(device).requires_grad_() for x in close_boxes(rng))
    for offset in (0, 1):
        value, want = (
            complete_box_iou(a, b, offset=offset),
            similarity(*pairs(a, b), "ciou", 1e-7, offset),
        )
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)
        g = torch.from_numpy(rng.normal(size=tuple(value.shape))).to(device)
        for x, y in zip(
            torch.autograd.grad(value, (a, b), g), torch.autograd.grad(want, (a, b), g), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_only_the_needed_gradients(device: torch.device, rng: np.random.Generator) -> None:
    a, b = (boxes(rng, n).float().to(device) for n in (6, 7))
    b.requires_grad_()
    total = complete_box_iou(a, b).sum()
    with host_cost() as cost:
        (grad,) = torch.autograd.grad(total, b)
    assert len(cost.launches) <= 1
    both = [x.detach().requires_grad_() for x in (a, b)]
    assert torch.equal(grad, torch.autograd.grad(complete_box_iou(*both).sum(), both)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str, device: torch.device, rng: np.random.Generator) -> None:
    wide = boxes(rng, 4, 20).to(device).mT.contiguous().mT[:, ::2]
    one = boxes(rng, 1).to(device).expand(4, 3, 4)
    a, b = (x.detach().requires_grad_() for x in (wide, one))
    c, d = (x.detach().clone(memory_format=torch.contiguous_format) for x in (wide, one))
    c.requires_grad_()
    d.requires_grad_()
    got, want = OPS[kind](a, b), OPS[kind](c, d)
    assert torch.equal(got, want)
    g = torch.from_numpy(rng.normal(size=(3, 10, 4))).to(device).permute(2, 1, 0)
    for x, y in zip(
        torch.autograd.grad(got, (a, b), g),
        torch.autograd.grad(want, (c, d), g.contiguous()),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_and_double_backward(
    kind: str, device: torch.device, rng: np.random.Generator
) -> None:
    a = boxes(rng, 5).to(device).requires_grad_()
    total = OPS[kind](a, a.detach() + 1).sum()
    first, second = (torch.autograd.grad(total, a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(total, a, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{OPS[kind].__name__} can be differentiated once only"):
        grad.sum().backward()


def test_order_of_programs_does_not_matter(kernel: torch.device, rng: np.random.Generator) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    a, b = (boxes(rng, n).float().requires_grad_() for n in (70, 300))

    def run() -> list[Tensor]:
        value = complete_box_iou(a, b)
        return [value, *torch.autograd.grad(value.sum(), (a, b))]

    want = run()
    with shuffled(1):
        got = run()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes1": [[0, 0, 1, 1]]}, TypeError, "boxes1 must be a torch.Tensor, got list"),
        ({"boxes2": torch.zeros(3, 5)}, ValueError, r"boxes2 must have shape .*got \(3, 5\)"),
        ({"boxes2": torch.zeros(3, 4).double()}, TypeError, "dtype of boxes1, torch.float32, got"),
        ({"boxes2": torch.zeros(2, 3, 4)}, ValueError, r"\(2, 4\) and \(2, 3, 4\)"),
        ({"offset": 2}, ValueError, "offset must be one of 0, 1, got 2"),
        ({"eps": -1e-7}, ValueError, "eps must be at least 0 and finite, got -1e-07"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0 and finite, got nan"),
        ({"eps": "0"}, TypeError, "eps must be a number at least 0 and finite, got str '0'"),
    ],
)
def test_rejected(kind: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    if kind == "giou" and "eps" in change:
        error, message = TypeError, "unexpected keyword argument 'eps'"
    arguments: dict[str, Any] = {"boxes1": torch.zeros(2, 4), "boxes2": torch.zeros(3, 4)}
    with pytest.raises(error, match=message):
        OPS[kind](**(arguments | change))
