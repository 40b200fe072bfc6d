"""Matching by IoU: exact answers, from the rule on the whole matrix."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dlops_triton import _dispatch, _settings, box_match
from dlops_triton.reference import match as reference
from tests.tools.interpreter import shuffled

Array = NDArray[Any]
SETS, CHUNKS = 1600, 8
# Fewer, larger steps: the interpreter's pace.
LARGE = {"BLOCK_N": 256, "BLOCK_M": 16}
SMALL = {"BLOCK_N": 32, "BLOCK_M": 2}
NEGATIVE, IGNORED = -1, -2


def matrix(anchors: Array, gt: Array) -> Array:
    """[N, M] IoU in the arithmetic of the boxes, fp64 or fp32."""
    dtype = np.float64 if anchors.dtype == np.float64 else np.float32
    a, b = anchors.astype(dtype), gt.astype(dtype)
    with np.errstate(all="ignore"):
        low = np.maximum(a[:, None, :2], b[None, :, :2])
        high = np.minimum(a[:, None, 2:], b[None, :, 2:])
        inter = np.maximum(high - low, 0).prod(-1)
        area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
        union = area_a[:, None] + area_b[None, :] - inter
        return np.asarray(np.where(union == 0, 0, inter / union))


def rule(
    anchors: Array,
    gt: Array,
    pos_iou: float = 0.5,
    neg_iou: float = 0.4,
    min_pos_iou: float = 0.0,
    match_low_quality: bool = True,
    gt_valid: Array | None = None,
) -> tuple[list[int], list[float]]:
    """The definition, step by step, on the valid columns of the matrix."""
    columns = np.arange(len(gt)) if gt_valid is None else np.flatnonzero(gt_valid)
    iou = matrix(anchors, gt)[:, columns]
    pos, neg, least = (np.float32(t) for t in (pos_iou, neg_iou, min_pos_iou))
    if len(columns) == 0:
        return [NEGATIVE] * len(anchors), [0.0] * len(anchors)
    known = np.where(np.isnan(iou), -1, iou)
    matched = np.full(len(anchors), IGNORED)
    for i, row in enumerate(known):
        if row.max() < neg or row.max() == -1:
            matched[i] = NEGATIVE
        elif row.max() >= pos:
            matched[i] = columns[row.argmax()]
    if match_low_quality and len(anchors):
        for j, column in zip(columns, known.T, strict=True):
            if column.max() >= least:
                matched[column == column.max()] = j
    return matched.tolist(), np.maximum(known.max(1, initial=-1), 0).tolist()


def random_boxes(rng: np.random.Generator, n: int, spread: float, whole: bool) -> Array:
    """Boxes with everything that goes wrong."""
    corner = rng.uniform(-spread, spread, (n, 2))
    boxes = np.concatenate([corner, corner + rng.exponential(20, (n, 2))], 1)
    if whole:
        boxes = boxes.round()  # ties
    for share, spoil in (
        (0.1, lambda b: b[:, [0, 1, 0, 3]]),  # zero area
        (0.05, lambda b: b[:, [0, 1, 0, 1]]),  # a point
        (0.05, lambda b: b[:, [2, 1, 0, 3]]),  # inverted in x
        (0.03, lambda b: b[:, [2, 3, 0, 1]]),  # inverted in both
        (0.1, lambda b: np.where(rng.random(b.shape) < 0.3, np.nan, b)),
        (0.05, lambda b: np.where(rng.random(b.shape) < 0.3, np.inf, b)),
        (0.05, lambda b: np.where(rng.random(b.shape) < 0.3, -np.inf, b)),
        (0.05, lambda b: b * 1e30),  # whose area overflows
        (0.05, lambda b: b * 1e17),  # whose IoU with others underflows
        (0.05, lambda b: b * 1e-22),  # whose area is subnormal
        (0.05, lambda b: np.full(b.shape, [-1e18, -1e18, 1e18, 1e18])),
    ):
        if rng.random() < 0.3:
            rows = rng.random(n) < share
            boxes[rows] = spoil(boxes[rows])
    return boxes.astype(rng.choice([np.float32, np.float32, np.float64]))


@np.errstate(all="ignore")
def random_set(seed: int, largest: int) -> tuple[Array, Array, dict[str, Any]]:
    """Anchors, boxes and options."""
    rng = np.random.default_rng(seed)
    n, m = (int(k * rng.random() ** 2 + rng.integers(0, 3)) for k in (largest, largest / 8))
    spread, whole = 10 ** rng.uniform(0.5, 2.5), bool(rng.random() < 0.5)
    anchors = random_boxes(rng, n, spread, whole)
    gt = random_boxes(rng, m, spread, whole).astype(anchors.dtype)
    if rng.random() < 0.3:
        scale = 10.0 ** rng.choice([-22, -20, -10, 15, 18])
        anchors, gt = (x * x.dtype.type(scale) for x in (anchors, gt))
    if m and rng.random() < 0.5:
        gt = gt[rng.integers(0, m, m)]  # duplicates
    if m and n and rng.random() < 0.5:
        rows = rng.random(n) < 0.2
        anchors[rows] = gt[rng.integers(0, m, n)][rows]
    low, high = np.sort(rng.choice([0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 1.0], 2))
    options = {
        "pos_iou": float(high),
        "neg_iou": float(low),
        "min_pos_iou": float(rng.choice([0.0, 0.0, 0.3, 0.5, 1e-3, 1.0])),
        "match_low_quality": bool(rng.random() < 0.8),
    }
    if rng.random() < 0.4:
        options["gt_valid"] = rng.random(m) < rng.choice([0.0, 0.5, 0.9])
    return anchors, gt, options


def run(
    device: torch.device, anchors: Array, gt: Array, **options: Any
) -> tuple[list[int], list[float]]:
    if "gt_valid" in options:
        options["gt_valid"] = torch.from_numpy(options["gt_valid"]).to(device)
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (anchors, gt))
    matched, max_iou = box_match(a, b, **options)
    assert matched.dtype == torch.int64
    assert max_iou.dtype == (torch.float64 if a.dtype == torch.float64 else torch.float32)
    assert not bool(max_iou.signbit().any())  # no -0
    return matched.tolist(), max_iou.tolist()


@contextlib.contextmanager
def sized(**values: int) -> Iterator[list[_settings.Override]]:
    """Both kernels with these settings."""
    with (
        _settings.override("match", **values) as first,
        _settings.override("match_low_quality", **values) as second,
    ):
        yield [first, second]


def grid(device: torch.device, *rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 4)


# ---- by hand


def test_thresholds_by_hand(device: torch.device) -> None:
    gt = grid(device, [0, 0, 10, 10], [20, 0, 30, 10])
    anchors = grid(
        device,
        [0, 0, 10, 10],  # 1 with box 0
        [0, 0, 10, 5],  # 0.5
        [0, 0, 9, 5],  # 0.45
        [0, 0, 10, 4],  # 0.4
        [0, 0, 10, 3.9],
        [20, 0, 30, 6],  # 0.6 with box 1, its best
        [50, 50, 60, 60],
    )
    matched, max_iou = box_match(anchors, gt, match_low_quality=False)
    assert matched.tolist() == [0, 0, IGNORED, IGNORED, NEGATIVE, 1, NEGATIVE]
    want = torch.tensor([1, 0.5, 0.45, 0.4, 0.39, 0.6, 0], dtype=torch.float32)
    torch.testing.assert_close(max_iou.cpu(), want, rtol=1e-6, atol=0)
    # 0.7 is out of reach of thresholds, and box 1 keeps its best anchor nevertheless.
    options = {"pos_iou": 0.7, "neg_iou": 0.3}
    matched, _ = box_match(anchors, gt, **options)  # type: ignore[arg-type]
    assert matched.tolist() == [0, *[IGNORED] * 4, 1, NEGATIVE]
    matched, _ = box_match(anchors, gt, min_pos_iou=0.6, **options)  # type: ignore[arg-type]
    assert matched.tolist() == [0, *[IGNORED] * 4, 1, NEGATIVE]
    matched, _ = box_match(anchors, gt, min_pos_iou=0.61, **options)  # type: ignore[arg-type]
    assert matched.tolist() == [0, *[IGNORED] * 5, NEGATIVE]


def test_the_last_box_takes_an_anchor_and_the_first_wins_a_tie(device: torch.device) -> None:
    anchors = grid(device, [0, 0, 10, 10], [100, 0, 110, 10], [100, 0, 110, 10])
    gt = grid(device, [0, 0, 10, 9], [0, 0, 10, 8], [0, 0, 10, 9], [100, 0, 110, 5])
    matched, _ = box_match(anchors, gt, match_low_quality=False)
    assert matched.tolist() == [0, 3, 3]
    # Every box but the last has anchor 0 for its best; box 3 has two.
    assert box_match(anchors, gt)[0].tolist() == [2, 3, 3]
    assert box_match(anchors, gt, min_pos_iou=0.81)[0].tolist() == [2, 3, 3]
    assert box_match(anchors, gt[[0, 1, 3]], min_pos_iou=0.5)[0].tolist() == [1, 2, 2]
    assert box_match(anchors, gt[[0, 1, 3]], min_pos_iou=0.85)[0].tolist() == [0, 2, 2]


def test_a_box_without_intersections_takes_all_of_iou_0(device: torch.device) -> None:
    """As in mmdet, whose comparison with min_pos_iou = 0 the largest IoU, 0, passes."""
    anchors = grid(device, [0, 0, 10, 10], [0, 0, 10, 8], [40, 40, 50, 50])
    gt = grid(device, [0, 0, 10, 10], [500, 500, 510, 510])
    assert box_match(anchors, gt)[0].tolist() == [1, 1, 1]
    assert box_match(anchors, gt.flip(0))[0].tolist() == [1, 0, 0]
    assert box_match(anchors, gt, min_pos_iou=1e-6)[0].tolist() == [0, 0, NEGATIVE]
    valid = torch.tensor([True, False], device=device)
    assert box_match(anchors, gt, gt_valid=valid)[0].tolist() == [0, 0, NEGATIVE]


def test_iou_exactly_at_a_threshold(device: torch.device) -> None:
    """Thresholds are rounded to fp32, up for 0.1 and down for 0.7; the IoU only for fp32 boxes."""
    for threshold, height, of_fp32, of_fp64 in (
        (0.5, 5.0, 0, 0),
        (0.1, 1.0, 0, NEGATIVE),
        (0.7, 7.0, 0, 0),
    ):
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, height]], dtype=torch.float64)
        gt, anchor = boxes.to(device).split(1)
        options: dict[str, Any] = {"pos_iou": threshold, "neg_iou": threshold}
        options["match_low_quality"] = False
        assert box_match(anchor.float(), gt.float(), **options)[0].tolist() == [of_fp32]
        assert box_match(anchor, gt, **options)[0].tolist() == [of_fp64]
        options["pos_iou"] = 1.0
        want = [NEGATIVE if of_fp64 == NEGATIVE else IGNORED]
        assert box_match(anchor, gt, **options)[0].tolist() == want
    gt, anchor = grid(device, [0, 0, 10, 10]), grid(device, [0, 0, 10, 5])
    above = math.nextafter(0.5, 1)  # 0.5 in fp32
    assert box_match(anchor, gt, pos_iou=above, match_low_quality=False)[0].tolist() == [0]
    matched, _ = box_match(anchor, gt, pos_iou=0.50000006, match_low_quality=False)
    assert matched.tolist() == [IGNORED]
    matched, _ = box_match(anchor, gt, pos_iou=1, min_pos_iou=0.50000006)
    assert matched.tolist() == [IGNORED]
    assert box_match(anchor, gt, pos_iou=1, min_pos_iou=above)[0].tolist() == [0]


# ---- the rule


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sets(chunk: int, device: torch.device) -> None:
    interpreted = device.type == "cpu" and _dispatch.cpu_implementation == "kernel"
    for seed in range(chunk, SETS, CHUNKS):
        small = seed // CHUNKS % 2 == 0  # tiles, most of which are left out
        anchors, gt, options = random_set(seed, 1000 if not interpreted else 80 if small else 300)
        with sized(**(SMALL if small else LARGE)):
            got = run(device, anchors, gt, **options)
        assert got == rule(anchors, gt, **options), f"seed {seed}"


@pytest.mark.parametrize("n", [1, 31, 32, 33, 65])
@pytest.mark.parametrize("m", [1, 2, 3, 9])
def test_edges_of_tiles(n: int, m: int, kernel: torch.device) -> None:
    """Small tiles, so that maxima and ties cross them, in any order of programs."""
    rng = np.random.default_rng(100 * n + m)
    corner = rng.integers(0, 12, (n + m, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 9, (n + m, 2))], 1).astype(np.float32)
    problem = boxes[:n], boxes[n:]
    with sized(**SMALL) as used:
        assert run(kernel, *problem) == rule(*problem)
        if kernel.type == "cpu":
            with shuffled(n):
                assert run(kernel, *problem) == rule(*problem)
    assert all(kernel.launches for kernel in used)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_programs_does_not_matter(seed: int, kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    anchors, gt, _ = random_set(5, 1500)
    assert len(anchors) > 256
    assert len(gt) > 16
    want = rule(anchors, gt)
    with shuffled(seed):
        assert run(kernel, anchors, gt) == want


def test_default_settings_and_many_anchors(kernel: torch.device) -> None:
    """A pyramid's worth of anchors of a small image, most of which meet no box."""
    strides = (16, 32, 64)
    cells = [
        np.stack(np.meshgrid(np.arange(0, 160, s), np.arange(0, 96, s)), -1).reshape(-1, 2)
        for s in strides
    ]
    sides = [np.array([[s, 2 * s], [2 * s, s]]) * 2 for s in strides]
    anchors = np.concatenate(
        [
            np.concatenate([c[:, None] - d / 2, c[:, None] + d / 2], -1).reshape(-1, 4)
            for c, d in zip(cells, sides, strict=True)
        ]
    ).astype(np.float32)
    gt = np.array(
        [[10, 10, 40, 70], [100, 20, 150, 60], [0, 0, 8, 8], [100, 20, 150, 60], [70, 70, 75, 90]],
        np.float32,
    )
    assert run(kernel, anchors, gt) == rule(anchors, gt)
    assert run(kernel, anchors[:140], gt, min_pos_iou=0.3) == rule(
        anchors[:140], gt, min_pos_iou=0.3
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_match_is_what_it_says(seed: int) -> None:
    anchors, gt, options = random_set(seed, 100)
    matched, max_iou = run(torch.device("cpu"), anchors, gt, **options)
    iou = matrix(anchors, gt)
    # As Python floats: numpy would round an fp64 IoU to fp32 before comparing it with an fp32 one.
    low, high = (float(np.float32(options[name])) for name in ("neg_iou", "pos_iou"))
    for i, (match, best) in enumerate(zip(matched, max_iou, strict=True)):
        assert IGNORED <= match < len(gt)
        assert 0 <= best <= 1
        if match >= 0:
            assert 0 <= iou[i, match] <= best
            assert options.get("gt_valid", np.ones(len(gt), bool))[match]
        elif match == IGNORED:
            assert low <= best < high


# ---- bad data


def test_anchors_without_an_iou_are_negative(device: torch.device) -> None:
    nan, inf = math.nan, math.inf
    gt = grid(device, [0, 0, 10, 10], [nan, 0, 10, 10])
    anchors = grid(device, [0, 0, 10, nan], [-inf, -inf, inf, inf], [0, 0, 10, 10])
    matched, max_iou = box_match(anchors, gt, pos_iou=0, neg_iou=0)
    # A finite share of an infinite union is an IoU, 0; box 1 has none with any anchor.
    assert matched.tolist() == [NEGATIVE, 0, 0]
    assert max_iou.tolist() == [0, 0, 1]


def test_anchors_far_from_all_boxes_have_iou_0_with_the_first(device: torch.device) -> None:
    anchors = grid(device, [50, 50, 60, 60])
    gt = grid(device, [0, 0, 10, 10], [20, 0, 30, 10])
    valid = torch.tensor([False, True], device=device)
    for pos, want in ((0.0, 0), (0.1, IGNORED)):
        options = {"pos_iou": pos, "neg_iou": 0.0, "min_pos_iou": 0.1}
        matched, max_iou = box_match(anchors, gt, **options)  # type: ignore[arg-type]
        assert (matched.item(), max_iou.item()) == (want, 0)
        matched, _ = box_match(anchors, gt, gt_valid=valid, **options)  # type: ignore[arg-type]
        assert matched.item() == (1 if pos == 0 else IGNORED)


@pytest.mark.parametrize("steps", [0.7, 1.4, 1.6, 2.45, 3.3])
def test_subnormal_iou(steps: float, device: torch.device) -> None:
    """Of a few units in the last place there is: T D, even 0.99 T D, may exceed I."""
    side = math.sqrt(steps * 2.0**-149 * 1e38)
    anchors = grid(device, [0, 0, side, side], *[[-9.0, -9, -8, -8]] * 31)
    gt = grid(device, *[[0.0, 0, 1e19, 1e19]] * 2)
    with sized(**SMALL):
        matched, max_iou = box_match(anchors, gt)
    assert matched.tolist() == [1, *[NEGATIVE] * 31]
    assert max_iou.tolist() == [round(steps) * 2.0**-149, *[0] * 31]


def test_reference_is_the_rule() -> None:
    """Without torch in between, on more anchors than the interpreter has time for."""
    anchors, gt, options = random_set(35, 20_000)
    assert len(anchors) > 1000
    options = {"pos_iou": 0.5, "neg_iou": 0.4, "min_pos_iou": 0.1, "match_low_quality": True}
    matched, max_iou = reference.box_match(anchors, gt, **options)
    assert (matched.tolist(), max_iou.tolist()) == rule(anchors, gt, **options)
