"""NMS of several images in a fixed amount of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlops_triton import nms_padded
from tests.nms_sets import THRESHOLDS, greedy, random_set
from tests.test_nms_tiers import KERNEL, module, working_hard

PADDED_TIERS = ["small", "segments", "bands"]


def padded_problem(seed: int, images: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    sets = []
    for b in range(images):
        while len((found := random_set(seed, 4 * n))[0]) < n:
            seed += 1
        sets.append([a[:n] for a in found[:3]])
        seed += b + 1
    boxes, scores, idxs = (np.stack(a) for a in zip(*sets, strict=True))
    return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(idxs)


def check_padded(padded: tuple[Tensor, Tensor], images: list[list[int]], max_output: int) -> None:
    """Image by image these indices, then -1."""
    indices, counts = padded
    assert (indices.dtype, counts.dtype) == (torch.int64, torch.int32)
    assert counts.tolist() == [len(kept) for kept in images]
    assert indices.tolist() == [kept + [-1] * (max_output - len(kept)) for kept in images]


@pytest.mark.parametrize("max_output", [0, 1, 13, 50, 300])
@pytest.mark.parametrize("score_threshold", [None, 0.2])
@pytest.mark.parametrize("classes", [False, True])
def test_padded_is_each_image_alone(
    classes: bool, score_threshold: float | None, max_output: int, device: torch.device
) -> None:
    boxes, scores, idxs = padded_problem(10, 4, 50)
    options = {"score_threshold": score_threshold, "max_output": max_output}
    want = []
    for b, n in enumerate((50, 0, 17, 50)):
        ids = idxs[b, :n] if classes else 0 * idxs[b, :n]
        want.append(
            greedy(*(x[b, :n].numpy() for x in (boxes, scores)), ids.numpy(), 0.4, **options)
        )  # type: ignore[arg-type]
    boxes, scores, idxs = (x.to(device) for x in (boxes, scores, idxs))
    before = [x.clone() for x in (boxes, scores, idxs)]
    padded = nms_padded(
        boxes,
        scores,
        0.4,
        idxs=idxs if classes else None,
        valid=torch.tensor([50, 5 - 2**32, 17, 2**33], device=device),
        **options,  # type: ignore[arg-type]
    )
    check_padded(padded, want, max_output)
    for x, y in zip((boxes, scores, idxs), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(
    ("tier", "classes"),
    [
        *((tier, False) for tier in PADDED_TIERS),
        *((tier, True) for tier in PADDED_TIERS if tier != "bands"),  # which are of one class
    ],
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_every_padded_tier(tier: str, classes: bool, seed: int) -> None:
    """200 sets each; 5,000 with --hypothesis-profile=thorough."""
    rng = np.random.default_rng(seed)
    images, n = int(rng.integers(1, 4)), int(rng.integers(1, 70))
    boxes, scores, idxs = padded_problem(seed, images, n)
    valid = torch.from_numpy(rng.integers(0, n + 1, images)) if rng.random() < 0.5 else None
    score_threshold = float(np.float32(rng.normal())) if rng.random() < 0.3 else None
    max_output = int(rng.integers(1, 2 * n))
    offset, threshold = int(rng.integers(0, 2)), float(np.float32(rng.choice(THRESHOLDS)))
    want = []
    for b in range(images):
        k = n if valid is None else int(valid[b])
        ids = idxs[b, :k].numpy() * (1 if classes else 0)
        of_image = boxes[b, :k].numpy(), scores[b, :k].numpy(), ids, threshold
        want.append(greedy(*of_image, offset, score_threshold, max_output))
    with working_hard(tier):
        padded = module._launch_padded(
            boxes.to(KERNEL),
            scores.to(KERNEL),
            idxs.to(KERNEL) if classes else None,
            None if valid is None else valid.to(KERNEL),
            threshold,
            offset,
            score_threshold,
            max_output,
            tier,
        )
    check_padded(padded, want, max_output)


def test_padded_of_nothing(device: torch.device) -> None:
    scores = torch.full((2, 5), 0.2, device=device)
    boxes = torch.rand(2, 5, 4, device=device)
    for padded in (
        nms_padded(boxes, scores, 0.5, score_threshold=0.2, max_output=3),
        nms_padded(boxes[:, :0], scores[:, :0], 0.5, max_output=3),
    ):
        check_padded(padded, [[], []], 3)
    assert nms_padded(boxes[:0], scores[:0], 0.5, max_output=3)[0].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_padded_of_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    boxes, scores = torch.rand(2, 60, 4).cumsum(2).to(dtype), torch.rand(2, 60).to(dtype)
    wide = boxes.double() if dtype == torch.float64 else boxes.float()
    want = [greedy(wide[b].numpy(), scores[b].double().numpy(), np.zeros(60), 0.3) for b in (0, 1)]
    check_padded(nms_padded(boxes.to(device), scores.to(device), 0.3, max_output=60), want, 60)


@pytest.mark.parametrize("tier", PADDED_TIERS)
def test_padded_of_images_that_lie_side_by_side(tier: str) -> None:
    """[N, B] in memory: whatever torch makes of the scores keeps that order."""
    boxes, scores, idxs = (x.to(KERNEL) for x in padded_problem(30, 3, 60))
    beside = [x.mT.contiguous().mT for x in (scores, idxs)]
    for ids in (None, idxs) if tier != "bands" else (None,):
        options = (None, 0.4, 0, None, 60, tier)
        want = module._launch_padded(boxes, scores, ids, *options)
        got = module._launch_padded(boxes, beside[0], None if ids is None else beside[1], *options)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 2, 0), (2, 0, None)])
def test_padded_under_vmap(dims: tuple[int, int, int | None], device: torch.device) -> None:
    boxes, scores, idxs = (x.to(device) for x in padded_problem(20, 6, 40))
    boxes, scores, idxs = boxes.view(3, 2, 40, 4), scores.view(3, 2, 40), idxs.view(3, 2, 40)
    if dims[2] is None:
        idxs = idxs[:1].expand(3, 2, 40)
    want = [nms_padded(boxes[v], scores[v], 0.4, idxs=idxs[v], max_output=9) for v in range(3)]
    got = torch.vmap(lambda b, s, i: nms_padded(b, s, 0.4, idxs=i, max_output=9), in_dims=dims)(
        boxes.movedim(0, dims[0]),
        scores.movedim(0, dims[1]),
        idxs[0] if dims[2] is None else idxs,
    )
    for out, each in zip(got, zip(*want, strict=True), strict=True):
        assert torch.equal(out, torch.stack(each))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have shape \[B, N, 4\].*\(3, 4\)"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores must have shape \(2, 3\).*got \(3,\)"),
        ({"idxs": torch.zeros(3).long()}, ValueError, r"idxs must have shape \(2, 3\).*\(3,\)"),
        ({"valid": torch.zeros(2)}, TypeError, "valid .*int64, int32, got torch.float32"),
        ({"valid": [3, 3]}, TypeError, "valid must be a torch.Tensor, got list"),
        ({"valid": torch.zeros(3).int()}, ValueError, r"valid must have shape \(2,\), one per im"),
        ({"valid": torch.zeros(2, device="meta").int()}, ValueError, "valid .*device of boxes"),
        ({"max_output": None}, TypeError, "max_output must be an integer .*got None"),
        ({"max_output": -1}, ValueError, "max_output must be .*got -1"),
        ({"iou_threshold": 2}, ValueError, r"iou_threshold must be in \[0, 1\], got 2"),
    ],
)
def test_padded_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "boxes": torch.zeros(2, 3, 4),
        "scores": torch.zeros(2, 3),
        "iou_threshold": 0.5,
        "max_output": 2,
    } | change
    with pytest.raises(error, match=message):
        nms_padded(**arguments)  # type: ignore[arg-type]
