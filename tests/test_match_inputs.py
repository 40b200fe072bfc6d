"""Matching: batches, layouts, dtypes, memory, rejected arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import profiler

from dlops_triton import _dispatch, box_iou, box_match
from tests.test_match import IGNORED, LARGE, NEGATIVE, random_set, sized

# ---- batches, layouts, dtypes


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_is_its_images(shared: bool, device: torch.device) -> None:
    rng = np.random.default_rng(7)
    corner = rng.integers(0, 40, (3, 170, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 20, corner.shape)], -1)
    anchors, gt = (torch.from_numpy(x).float().to(device) for x in np.split(boxes, [150], axis=1))
    valid = torch.from_numpy(rng.random((3, 20)) < [[1], [0.5], [0]]).to(device)
    anchors = anchors[0] if shared else anchors
    with sized(**LARGE):
        matched, max_iou = box_match(anchors, gt, gt_valid=valid)
        assert matched.shape == max_iou.shape == (3, 150)
        for i in range(3):
            one = anchors if shared else anchors[i]
            alone = box_match(one, gt[i], gt_valid=valid[i])
            assert torch.equal(matched[i], alone[0])
            assert torch.equal(max_iou[i], alone[1])
            kept = box_match(one, gt[i][valid[i]])
            indices = valid[i].nonzero()[:, 0]
            assert torch.equal(max_iou[i], kept[1])
            by_place = torch.cat([indices, indices.new_tensor([IGNORED, NEGATIVE])])
            assert torch.equal(matched[i], by_place[kept[0]])
    assert bool((matched[2] == NEGATIVE).all())


def test_fp32_maxima_are_those_of_box_iou(kernel: torch.device) -> None:
    """And of torch.max, whose first index counts on the CPU."""
    anchors, gt, _ = random_set(5, 600)
    a, b = (torch.from_numpy(x).float().nan_to_num(0, 9, -9).to(kernel) for x in (anchors, gt))
    matched, max_iou = box_match(a, b, pos_iou=0, neg_iou=0, match_low_quality=False)
    values, indices = box_iou(a, b).cpu().max(1)
    assert torch.equal(max_iou.cpu(), values)
    assert torch.equal(matched.cpu(), indices)


def test_any_strides(device: torch.device) -> None:
    anchors, gt, _ = random_set(5, 600)
    a, b = (torch.from_numpy(x).to(device) for x in (anchors, gt))
    want = box_match(a, b)
    valid = torch.ones(len(b), 2, dtype=torch.bool, device=device)
    for x in (a.mT.contiguous().mT, a.repeat_interleave(2, 0)[::2]):
        got = box_match(x, b.mT.contiguous().mT, gt_valid=valid[:, 0])
        assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
    batch = [x.expand(3, *x.shape) for x in (a, b)]
    got = box_match(*batch, gt_valid=valid[:, 0].expand(3, -1))
    for image in range(3):
        assert all(torch.equal(p[image], q) for p, q in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_compared_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    anchors, gt, _ = random_set(35, 300)
    a, b = (torch.from_numpy(x).to(device).to(dtype) for x in (anchors, gt))
    got, want = box_match(a, b), box_match(a.float(), b.float())
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("batch", [(), (0,), (2,)])
def test_empty(shape: tuple[int, int], batch: tuple[int, ...], device: torch.device) -> None:
    n, m = shape
    a, b = (torch.ones(*batch, k, 4, device=device) for k in shape)
    valid = torch.ones(*batch, m, dtype=torch.bool, device=device)
    for options in ({}, {"gt_valid": valid}):
        matched, max_iou = box_match(a, b, pos_iou=0, neg_iou=0, **options)  # type: ignore[arg-type]
        assert matched.shape == max_iou.shape == (*batch, n)
        assert (matched.dtype, max_iou.dtype) == (torch.int64, torch.float32)
        assert matched.device.type == max_iou.device.type == device.type
        assert bool((matched == NEGATIVE).all())
        assert bool((max_iou == 0).all())


def test_inputs_may_require_gradients_and_stay_as_they_are(device: torch.device) -> None:
    a, b = (torch.rand(n, 4, device=device).cumsum(1).requires_grad_() for n in (40, 5))
    before = a.detach().clone(), b.detach().clone()
    matched, max_iou = box_match(a, b)
    assert not matched.requires_grad
    assert not max_iou.requires_grad
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_is_linear(
    dtype: torch.dtype, kernel: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the launcher allocates beside inputs and outputs, at a training loop's size."""
    monkeypatch.setattr(_dispatch, "launch", lambda *_, **__: None)
    batch, n, m = 2, 200_000, 300
    anchors = torch.zeros(n, 4, dtype=dtype, device=kernel)
    gt = torch.zeros(batch, m, 4, dtype=dtype, device=kernel)
    valid = torch.ones(batch, m, dtype=torch.bool, device=kernel)
    with profiler.profile(profile_memory=True) as profile:
        results = box_match(anchors, gt, gt_valid=valid)
    events = profile.kineto_results.events()
    allocated = sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
    outputs = sum(t.nbytes for t in results)
    assert outputs <= allocated <= outputs + 32 * (n + m)
    assert allocated - outputs <= batch * m * 8 + 1024  # the boxes' largest IoUs, and no more


# ---- rejected


def call(**change: Any) -> dict[str, Any]:
    return {"anchors": torch.zeros(3, 4), "gt": torch.zeros(2, 4)} | change


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (call(anchors=[[0, 0, 1, 1]]), TypeError, "anchors must be a torch.Tensor, got list"),
        (call(anchors=torch.zeros(3, 5)), ValueError, r"anchors must have shape .*got \(3, 5\)"),
        (call(anchors=torch.zeros(1, 1, 3, 4)), ValueError, r"anchors .*got shape \(1, 1, 3, 4\)"),
        (call(gt=torch.zeros(4)), ValueError, r"gt must have shape .*got \(4,\)"),
        (call(gt=torch.zeros(2, 4).long()), TypeError, "gt .*got torch.int64"),
        (call(gt=torch.zeros(2, 4).double()), TypeError, "dtype of anchors, torch.float32, got"),
        (call(gt=torch.zeros(2, 4, device="meta")), ValueError, "device of anchors, cpu, got meta"),
        (call(anchors=torch.zeros(1, 3, 4)), ValueError, r"gt .*\(2, 4\) and \(1, 3, 4\)"),
        (call(gt_valid=[True, True]), TypeError, "gt_valid must be a torch.Tensor, got list"),
        (call(gt_valid=torch.ones(2)), TypeError, "gt_valid .*dtypes bool, got torch.float32"),
        (call(gt_valid=torch.ones(3).bool()), ValueError, r"gt_valid .*\(2,\).*got \(3,\)"),
        (call(gt_valid=torch.ones(2, device="meta").bool()), ValueError, "gt_valid .*got meta"),
        (call(pos_iou=1.5), ValueError, r"pos_iou must be in \[0, 1\], got 1.5"),
        (call(neg_iou=-0.1), ValueError, r"neg_iou must be in \[0, 1\], got -0.1"),
        (call(min_pos_iou=math.nan), ValueError, r"min_pos_iou must be in \[0, 1\], got nan"),
        (call(pos_iou="0.5"), TypeError, "pos_iou must be a number .*got str"),
        (call(neg_iou=0.6), ValueError, "neg_iou must be at most pos_iou, 0.5, got 0.6"),
        (call(match_low_quality=1), ValueError, "match_low_quality must be one of .*got 1"),
    ],
)
def test_rejected(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        box_match(**arguments)
