"""Pairwise IoU: the reference against outside facts, the kernels against the reference."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlops_triton import _settings, box_iou
from dlops_triton.reference import iou as reference
from tests import peers
from tests.arrays import numpy
from tests.tolerances import assert_close
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import shuffled

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Around the tiles of 32 x 128 forward and 32 x 32 backward.
SHAPES = [(0, 3), (3, 0), (1, 1), (31, 127), (32, 128), (33, 129), (65, 40)]
Mode = Literal["iou", "iof"]
MODES: list[Mode] = ["iou", "iof"]


def boxes(rng: np.random.Generator, *shape: int, size: float = 60) -> Tensor:
    """Overlapping boxes whose coordinates every dtype holds exactly."""
    corner = rng.integers(-30, 60, (*shape, 2))
    return torch.from_numpy(
        np.concatenate([corner, corner + rng.integers(0, int(size), (*shape, 2))], -1)
    ).double()


def textbook(a: Tensor, b: Tensor, offset: int, mode: str) -> Tensor:
    """torchvision's formula, differentiable by torch, with 0 where the denominator is 0."""
    low = torch.max(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.min(a[..., :, None, 2:], b[..., None, :, 2:])
    inter = (high - low + offset).clamp(min=0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2] + offset).prod(-1) for x in (a, b))
    below = area_a[..., :, None] + 0 * inter
    if mode == "iou":
        below = below + area_b[..., None, :] - inter
    defined = below != 0
    return torch.where(defined, inter / torch.where(defined, below, 1), 0)


# ---- the reference, pinned from outside


def test_reference_by_hand() -> None:
    a = np.array([[0, 0, 2, 2], [5, 5, 5, 5]])
    b = np.array([[1, 1, 3, 3], [0, 0, 2, 1], [9, 9, 8, 8], [5, 5, 5, 5]])
    np.testing.assert_allclose(reference.box_iou(a, b), [[1 / 7, 1 / 2, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        reference.box_iou(a, b, offset=1), [[4 / 14, 6 / 9, 0, 0], [0, 0, 0, 1]]
    )
    np.testing.assert_allclose(
        reference.box_iou(a, b, mode="iof"), [[1 / 4, 1 / 2, 0, 0], [0, 0, 0, 0]]
    )


@pytest.mark.parametrize(("case", "arrays"), peers.cases("box_iou"))
def test_reference_agrees_with_the_peers(case: Any, arrays: dict[str, Any]) -> None:
    a, b = arrays["boxes1"], arrays["boxes2"]
    offset1 = reference.box_iou(a, b, offset=1)
    np.testing.assert_allclose(reference.box_iou(a, b), arrays["iou"], rtol=1e-12)
    np.testing.assert_allclose(offset1, arrays["iou_offset1"], rtol=1e-6)
    if np.all(a[:, 2] - a[:, 0] > 1):  # mmdet raises smaller areas to 1e-6
        np.testing.assert_allclose(reference.box_iou(a, b, mode="iof"), arrays["iof"], rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [0, 1])
def test_reference_gradient_is_torchs(mode: Mode, offset: int, rng: np.random.Generator) -> None:
    # Integer corners in a small range: plenty of ties, touching and identical boxes.
    a, b = boxes(rng, 3, 30, size=9), boxes(rng, 3, 25, size=9)
    a[:, :5] = b[:, :5]
    a, b = (x.clamp(-5, 9).requires_grad_() for x in (a, b))
    g = torch.from_numpy(rng.normal(size=(3, 30, 25)))
    iou = textbook(a, b, offset, mode)
    want = torch.autograd.grad((g * iou).sum(), (a, b))
    arrays = numpy(a), numpy(b)
    np.testing.assert_allclose(
        reference.box_iou(*arrays, offset=offset, mode=mode), numpy(iou), rtol=1e-13
    )
    got = reference.box_iou_grad(*arrays, numpy(g), offset=offset, mode=mode)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, numpy(y), rtol=1e-9, atol=1e-12)


# ---- the op against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matches_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, int],
    mode: Mode,
    kernel: torch.device,
    rng: np.random.Generator,
) -> None:
    n, m = shape
    a = boxes(rng, n).to(dtype).to(kernel).requires_grad_()
    b = boxes(rng, m).to(dtype).to(kernel).requires_grad_()
    g = torch.from_numpy(rng.normal(size=shape)).to(dtype).to(kernel)
    iou = box_iou(a, b, mode=mode)
    iou.backward(g)
    assert iou.dtype == dtype
    assert_close(iou, reference.box_iou(numpy(a), numpy(b), mode=mode))
    want = reference.box_iou_grad(numpy(a), numpy(b), numpy(g), mode=mode)
    size = reference.box_iou_grad(numpy(a), numpy(b), np.abs(numpy(g)), mode=mode)
    for x, y, terms in zip((a, b), want, size, strict=True):
        assert x.grad is not None
        # The sums over the other side cancel.
        assert_close(x.grad, y, scale=np.abs(terms) + 0.1)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_batched_and_offset(
    offset: Literal[0, 1], mode: Mode, device: torch.device, rng: np.random.Generator
) -> None:
    a, b = (boxes(rng, 2, 3, n).to(device).requires_grad_() for n in (40, 33))
    iou = box_iou(a, b, offset=offset, mode=mode)
    g = torch.from_numpy(rng.normal(size=(2, 3, 40, 33))).to(device)
    iou.backward(g)
    assert_close(iou, reference.box_iou(numpy(a), numpy(b), offset=offset, mode=mode))
    want = reference.box_iou_grad(numpy(a), numpy(b), numpy(g), offset=offset, mode=mode)
    for x, y in zip((a, b), want, strict=True):
        assert x.grad is not None
        assert_close(x.grad, y, scale=1)


@pytest.mark.parametrize("programs", [1, 6])
def test_gradients_over_several_blocks_and_splits(
    programs: int, kernel: torch.device, rng: np.random.Generator
) -> None:
    a = boxes(rng, 20).to(kernel).requires_grad_()
    b = boxes(rng, 150).to(kernel).requires_grad_()
    g = torch.from_numpy(rng.normal(size=(20, 150))).to(kernel)
    with _settings.override("iou_bwd", programs=programs) as used:
        box_iou(a, b).backward(g)
    assert used.launches == 2
    want = reference.box_iou_grad(numpy(a), numpy(b), numpy(g))
    for x, y in zip((a, b), want, strict=True):
        assert x.grad is not None
        assert_close(x.grad, y, scale=1)


def test_fp32_is_ieee_arithmetic(kernel: torch.device, rng: np.random.Generator) -> None:
    """Bit for bit what numpy gives in fp32: what thresholds are compared with."""
    a = (rng.random((70, 4)) * 100).astype(np.float32)
    a[:, 2:] += a[:, :2]
    low = np.maximum(a[:, None, :2], a[None, :, :2])
    high = np.minimum(a[:, None, 2:], a[None, :, 2:])
    sides = np.maximum(high - low, 0)
    inter = sides[..., 0] * sides[..., 1]
    area = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    want = inter / (area[:, None] + area[None, :] - inter)
    x = torch.from_numpy(a).to(kernel)
    assert np.array_equal(box_iou(x, x).cpu().numpy(), want)


# ---- properties


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), m=st.integers(1, 12))
def test_symmetric_and_between_0_and_1(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = boxes(rng, n).float(), boxes(rng, m).float()
    iou = box_iou(a, b)
    assert torch.equal(iou, box_iou(b, a).mT)
    assert bool(((iou >= 0) & (iou <= 1)).all())
    solid = (a[:, 2:] > a[:, :2]).all(1)
    assert torch.equal(box_iou(a, a).diagonal()[solid], torch.ones(int(solid.sum())))


# ---- bad data


def test_bad_boxes_stay_among_themselves(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    good = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15]], device=device)
    bad = torch.tensor(
        [[nan, nan, 10, 10], [0, 0, inf, inf], [3, 3, 3, 3], [9, 9, 1, 1], [-inf, -inf, 5, 5]],
        device=device,
    )
    a = torch.cat([good, bad]).requires_grad_()
    iou = box_iou(a, a)
    assert bool(iou[0].isnan().tolist() == [False, False, True] + [False] * 4)
    assert bool(iou[2].isnan().all())
    assert iou[1, 3].item() == 0  # the share of a finite box in an infinite one
    assert iou[4].tolist()[4] == 0  # a point with itself: no area, IoU 0
    assert iou[4, 0].item() == 0
    iou.nan_to_num(0).sum().backward()
    assert a.grad is not None
    assert bool(a.grad[:2].isfinite().all())
    assert a.grad[2].tolist() == [0, 0, 0, 0]


def test_iof_of_a_point_in_a_bad_box(device: torch.device) -> None:
    point = torch.tensor([[1.0, 1, 1, 1]], device=device)
    bad = torch.tensor([[float("nan"), 0, 2, 2]], device=device)
    assert bool(box_iou(point, bad, mode="iof").isnan())


def test_touching_and_degenerate(device: torch.device) -> None:
    a = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [0, 0, 0, 4]], device=device)
    want = [[1.0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert box_iou(a, a).tolist() == want


# ---- behaviour inside torch


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: Mode, device: torch.device, rng: np.random.Generator) -> None:
    corner = torch.from_numpy(rng.random((2, 5, 2)) * 10)
    a = torch.cat([corner, corner + 3 + torch.from_numpy(rng.random((2, 5, 2)))], -1).to(device)
    b = (a.flip(-2)[:, :4] + 0.31).detach().requires_grad_()
    a.requires_grad_()
    for offset in (0, 1):
        assert torch.autograd.gradcheck(
            lambda a, b, o=offset: box_iou(a, b, offset=o, mode=mode), (a, b), fast_mode=True
        )


def test_only_the_needed_gradients(device: torch.device, rng: np.random.Generator) -> None:
    a, b = (boxes(rng, n).float().to(device) for n in (6, 7))
    b.requires_grad_()
    total = box_iou(a, b).sum()
    with host_cost() as cost:
        (grad,) = torch.autograd.grad(total, b)
    assert len(cost.launches) <= 1
    both = [x.detach().requires_grad_() for x in (a, b)]
    assert torch.equal(grad, torch.autograd.grad(box_iou(*both).sum(), both)[1])


def test_any_strides(device: torch.device, rng: np.random.Generator) -> None:
    wide = boxes(rng, 4, 20).to(device).mT.contiguous().mT[:, ::2]
    one = boxes(rng, 1).to(device).expand(4, 3, 4)
    a, b = (x.detach().requires_grad_() for x in (wide, one))
    c, d = (x.detach().clone(memory_format=torch.contiguous_format) for x in (wide, one))
    c.requires_grad_()
    d.requires_grad_()
    got, want = box_iou(a, b), box_iou(c, d)
    assert torch.equal(got, want)
    g = torch.from_numpy(rng.normal(size=(3, 10, 4))).to(device).permute(2, 1, 0)
    for x, y in zip(
        torch.autograd.grad(got, (a, b), g),
        torch.autograd.grad(want, (c, d), g.contiguous()),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_backward_twice_and_double_backward(device: torch.device, rng: np.random.Generator) -> None:
    a = boxes(rng, 5).to(device).requires_grad_()
    total = box_iou(a, a.detach() + 1).sum()
    first, second = (torch.autograd.grad(total, a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(total, a, create_graph=True)
    with pytest.raises(RuntimeError, match="box_iou can be differentiated once only"):
        grad.sum().backward()


def test_order_of_programs_does_not_matter(kernel: torch.device, rng: np.random.Generator) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    a, b = (boxes(rng, n).float().requires_grad_() for n in (70, 300))

    def run() -> list[Tensor]:
        iou = box_iou(a, b)
        return [iou, *torch.autograd.grad(iou.sum(), (a, b))]

    want = run()
    with shuffled(1):
        got = run()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes1": [[0, 0, 1, 1]]}, TypeError, "boxes1 must be a torch.Tensor, got list"),
        ({"boxes1": torch.zeros(4)}, ValueError, r"boxes1 must have shape .*got \(4,\)"),
        ({"boxes2": torch.zeros(3, 5)}, ValueError, r"boxes2 must have shape .*got \(3, 5\)"),
        ({"boxes2": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "boxes2 .*torch.int64"),
        ({"boxes2": torch.zeros(3, 4).double()}, TypeError, "dtype of boxes1, torch.float32, got"),
        ({"boxes2": torch.zeros(2, 3, 4)}, ValueError, r"\(2, 4\) and \(2, 3, 4\)"),
        ({"boxes2": torch.zeros(3, 4, device="meta")}, ValueError, "device of boxes1, cpu, got"),
        ({"offset": 2}, ValueError, "offset must be one of 0, 1, got 2"),
        ({"mode": "giou"}, ValueError, "mode must be one of 'iou', 'iof', got 'giou'"),
    ],
)
def test_rejected(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"boxes1": torch.zeros(2, 4), "boxes2": torch.zeros(3, 4)}
    with pytest.raises(error, match=message):
        box_iou(**(arguments | change))
