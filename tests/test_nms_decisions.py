"""Does one box overlap another by more than a threshold? As IEEE division has it, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dlops_triton import _dispatch, nms
from dlops_triton.kernels._nms import decision, excess, has_tiny, read_boxes
from tests.nms_sets import Array

SIZE = 128
SMALL = 2.0**-100
THRESHOLDS = [
    *(0.5, 0.7, 0.3, 1 / 3, 0.1, 1.0, 0.999, 2.0**-20, 0.0),
    # Where powers of two come into play, and subnormal ones.
    *(
        SMALL,
        np.nextafter(np.float32(SMALL), np.float32(0)),
        SMALL * 1.25,
        SMALL / 2,
        1.0760448e-31,
    ),
    *(2.0**-126, 2.0**-127, 2.0**-149, 3 * 2.0**-149, 2.0**-140 + 2.0**-149),
]


@triton.jit
def decide_kernel(boxes_ptr, out_ptr, threshold, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """out[j, i]: does box j strike box i?"""
    lane = tl.arange(0, SIZE)
    box = read_boxes(boxes_ptr, lane, lane < SIZE, OFFSET)
    deciding = decision(threshold)
    if has_tiny(box, deciding):
        over = excess(box, box, threshold, deciding, OFFSET, True)
    else:
        over = excess(box, box, threshold, deciding, OFFSET, False)
    tl.store(out_ptr + lane[:, None] * SIZE + lane[None, :], (over > 0).to(tl.int8))


def decided(boxes: Array, threshold: float, offset: int = 0) -> Array:
    device = "cpu" if _dispatch.INTERPRETED else "cuda"
    x = torch.from_numpy(boxes).to(device)
    out = torch.empty(SIZE, SIZE, dtype=torch.int8, device=device)
    decide_kernel[(1,)](
        x, out, float(np.float32(threshold)), OFFSET=offset, SIZE=SIZE, enable_fp_fusion=False
    )
    return out.cpu().numpy().astype(bool)


def divided(boxes: Array, threshold: float, offset: int = 0) -> Array:
    one = np.float32(offset)
    with np.errstate(all="ignore"):
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        side = np.maximum(high - low + one, 0)
        inter = side[..., 0] * side[..., 1]
        area = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
        found: Array = inter / (area[:, None] + area[None, :] - inter) > np.float32(threshold)
    return found


def nested(rng: np.random.Generator, threshold: float, least: float, most: float) -> Array:
    """Boxes at the origin, half of them so high that they are about the threshold of another."""
    power = rng.uniform(least, most, SIZE // 2)
    wide = (rng.uniform(1, 2, SIZE // 2) * 2.0**power).astype(np.float32)
    tall = (rng.uniform(1, 2, SIZE // 2) * 2.0 ** rng.uniform(least, most)).astype(np.float32)
    narrow = wide * np.float32(max(threshold, 2.0**-149))
    bits = narrow.view(np.int32) + rng.integers(-2, 3, SIZE // 2, np.int32)
    narrow = np.maximum(bits, 0).view(np.float32)
    boxes = np.zeros((SIZE, 4), np.float32)
    boxes[:, 2] = np.concatenate([wide, narrow])
    boxes[:, 3] = np.concatenate([tall, tall])
    return boxes


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("span", [(-3, 9), (-74, 63), (-74, -50), (-60, -20), (30, 63)])
def test_about_the_threshold(threshold: float, span: tuple[float, float]) -> None:
    """16,384 pairs at a time, areas from the least to the largest number."""
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        for _ in range(4):
            boxes = nested(rng, threshold, *span)
            assert np.array_equal(decided(boxes, threshold), divided(boxes, threshold))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_whatever_the_boxes(threshold: float, offset: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):
        boxes = (rng.normal(size=(SIZE, 4)) * 2.0 ** rng.uniform(-70, 60, (SIZE, 1))).astype(
            np.float32
        )
        boxes[:64, 2:] = boxes[:64, :2] + np.abs(boxes[:64, 2:])
        boxes[::9] = rng.choice([0, 1, -np.inf, np.inf, np.nan, 3e38], boxes[::9].shape)
        boxes[1::9] = boxes[::9][: len(boxes[1::9])]
        assert np.array_equal(decided(boxes, threshold, offset), divided(boxes, threshold, offset))


def test_an_iou_half_way_above_an_odd_subnormal_is_rounded_up(device: torch.device) -> None:
    boxes = [[0, 0, 2.0**60, 2.0**30], [0, 0, 3 * 2.0**-40, 2.0**-20]]
    scores = torch.tensor([1, 0.5], device=device)
    assert nms(torch.tensor(boxes, device=device), scores, 2.0**-149).tolist() == [0]
