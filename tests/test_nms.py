"""NMS: exact indices, from the definition, the peers, and across implementations."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dlops_triton import _dispatch, _settings, batched_nms, nms
from dlops_triton import _nms as launchers
from dlops_triton.reference import nms as reference
from tests import peers
from tests.tools.host_cost import memory
from tests.tools.interpreter import shuffled

# The function of the same name hides the module from an import statement.
module = importlib.import_module("dlops_triton.nms")

Array = NDArray[Any]
THRESHOLDS = [0.0, 0.5, 1.0, 0.3]
SETS, CHUNKS = 2000, 20
KERNEL = torch.device("cpu" if _dispatch.INTERPRETED else "cuda")


def greedy(
    boxes: Array,
    scores: Array,
    idxs: Array,
    threshold: float,
    offset: int = 0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> list[int]:
    """The definition, box by box, on the whole fp32 IoU matrix."""
    boxes = boxes.astype(np.float64 if boxes.dtype == np.float64 else np.float32)
    with np.errstate(all="ignore"):
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        one = boxes.dtype.type(offset)
        sides = np.maximum(high - low + one, 0)
        inter = sides[..., 0] * sides[..., 1]
        area = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
        over = inter / (area[:, None] + area[None, :] - inter) > np.float32(threshold)
    over &= idxs[:, None] == idxs[None, :]
    order = sorted(range(len(boxes)), key=lambda i: (math.isnan(scores[i]), -scores[i]))
    if score_threshold is not None:
        order = [i for i in order if scores[i] > score_threshold]
    kept: list[int] = []
    fallen = np.zeros(len(boxes), bool)
    for i in order:
        if not fallen[i]:
            kept.append(i)
            fallen |= over[i]
    return kept[:max_output]


def random_set(seed: int, largest: int) -> tuple[Array, Array, Array, float]:
    """Boxes with everything that goes wrong, scores with ties, classes, a threshold."""
    rng = np.random.default_rng(seed)
    n = int(largest * rng.random() ** 5 + rng.integers(0, 3))
    spread = 10 ** rng.uniform(0.5, 3)
    corner = rng.uniform(-spread, spread, (n, 2))
    boxes = np.concatenate([corner, corner + rng.exponential(20, (n, 2))], 1)
    if rng.random() < 0.5:
        boxes = boxes.round()  # ties in the IoU itself, zero areas
    for share, spoil in (
        (0.1, lambda b: b[rng.integers(0, n, len(b)) % max(len(b), 1)]),  # duplicates
        (0.05, lambda b: b[:, [0, 1, 0, 3]]),  # zero area
        (0.05, lambda b: b[:, [2, 1, 0, 3]]),  # inverted in x
        (0.03, lambda b: b[:, [2, 3, 0, 1]]),  # inverted in both
        (0.03, lambda b: np.where(rng.random(b.shape) < 0.3, np.nan, b)),
        (0.03, lambda b: np.where(rng.random(b.shape) < 0.3, np.inf, b)),
        (0.03, lambda b: np.where(rng.random(b.shape) < 0.3, -np.inf, b)),
        (0.03, lambda b: b * 1e30),
    ):
        if rng.random() < 0.5:
            rows = rng.random(n) < share
            boxes[rows] = spoil(boxes[rows])
    if n and rng.random() < 0.5:
        boxes = boxes[rng.integers(0, n, n)]
    scores = rng.normal(size=n)
    if rng.random() < 0.5:
        scores = (scores * 3).round() / 3  # ties, zeros of both signs
    if rng.random() < 0.3:
        scores[rng.random(n) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
    classes = int(rng.choice([1, 2, 10, 80, 300]))
    idxs = rng.integers(-3, classes - 3, n) * int(rng.choice([1, 2**33]))
    threshold = float(rng.choice(THRESHOLDS))
    return boxes.astype(np.float32), scores.astype(np.float32), idxs, threshold


def run(device: torch.device, *arrays: Any, **options: Any) -> list[int]:
    boxes, scores, idxs = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays[:3])
    kept = batched_nms(boxes, scores, idxs, arrays[3], **options)
    assert kept.dtype == torch.int64
    return kept.tolist()  # type: ignore[no-any-return]


# ---- the definition


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sets(chunk: int, device: torch.device) -> None:
    """2,000 sets, up to 3,000 boxes; where the kernels are interpreted 200, up to 150."""
    interpreted = device.type == "cpu" and _dispatch.cpu_implementation == "kernel"
    step = CHUNKS * (10 if interpreted else 1)
    for seed in range(chunk, SETS, step):
        problem = random_set(seed, 150 if interpreted else 3000)
        assert run(device, *problem) == greedy(*problem), f"seed {seed}"


# Name: tier, whether it takes classes, and module attributes and settings that make it work hard.
TIERS: dict[str, tuple[str, bool, dict[str, Any], dict[str, dict[str, int]]]] = {
    "small": ("small", False, {}, {}),
    "small, classes": ("small", True, {}, {"nms_small": {"BLOCK": 64}}),
    "segments": ("segments", False, {}, {"nms_segments": {"BLOCK": 64}}),
    "segments, classes": ("segments", True, {}, {"nms_segments": {"CHUNK": 16}}),
    "segments, large ones": ("segments", True, {"LARGEST_SEGMENT": 12}, {}),
    "one band": ("bands", False, {}, {"nms_mask": {"BLOCK": 64}}),
    "bands": (
        *("bands", False, {"band": lambda n: 64}),
        {"nms_mask": {"BLOCK": 32}, "nms_resolve": {"WORDS": 1}, "nms_suppress": {"SHARE": 16}},
    ),
}
# More rows per step: the interpreter's pace.
INTERPRETED: dict[str, dict[str, int]] = {
    name: {"ROWS": 32} for name in ("nms_small", "nms_segments", "nms_mask", "nms_suppress")
}


@contextlib.contextmanager
def working_hard(tier: str) -> Iterator[None]:
    _, _, attributes, settings = TIERS[tier]
    with contextlib.ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(mock.patch.object(launchers, name, value))
        for found in (INTERPRETED if _dispatch.INTERPRETED else {}, settings):
            for name, values in found.items():
                stack.enter_context(_settings.override(name, **values))
        yield


def run_tier(tier: str, problem: tuple[Array, Array, Array, float], **options: Any) -> list[int]:
    """The indices, through the launcher that the public functions call."""
    boxes, scores, idxs = (torch.from_numpy(a.copy()).to(KERNEL) for a in problem[:3])
    name, takes_classes, *_ = TIERS[tier]
    with working_hard(tier):
        kept = module._launch(
            boxes,
            scores,
            idxs if takes_classes else None,
            float(np.float32(problem[3])),
            options.get("offset", 0),
            options.get("score_threshold"),
            options.get("max_output"),
            name,
        )
    return kept.tolist()


def expected(tier: str, problem: tuple[Array, Array, Array, float], **options: Any) -> list[int]:
    boxes, scores, idxs, threshold = problem
    return greedy(boxes, scores, idxs if TIERS[tier][1] else 0 * idxs, threshold, **options)


@pytest.mark.parametrize("tier", TIERS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_every_tier(tier: str, seed: int) -> None:
    """200 sets each; 5,000 with --hypothesis-profile=thorough."""
    rng = np.random.default_rng(seed)
    problem = random_set(seed, int(rng.choice([20, 150, 150, 150, 700])))
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["score_threshold"] = float(np.float32(rng.normal()))
    if rng.random() < 0.3:
        options["max_output"] = int(rng.integers(0, 40))
    if rng.random() < 0.3:
        options["offset"] = 1
    assert run_tier(tier, problem, **options) == expected(tier, problem, **options)


@pytest.mark.parametrize("tier", TIERS)
def test_two_thousand_boxes(tier: str) -> None:
    """Several blocks of every tier as it is set; 13,000 classes."""
    rng = np.random.default_rng(3)
    n = 2048 if tier.startswith("small") else 4096 if "classes" in tier else 2500
    corner = rng.uniform(-500, 500, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (n, 2))], 1).astype(np.float32)
    scores = rng.integers(0, n // 2, n).astype(np.float32)
    idxs = rng.integers(0, 13_000 if tier == "segments, classes" else 3, n)
    problem = boxes, scores, idxs, 0.4
    assert run_tier(tier, problem) == expected(tier, problem)


@pytest.mark.parametrize("tier", TIERS)
def test_order_of_programs_does_not_matter(tier: str) -> None:
    if not _dispatch.INTERPRETED:
        pytest.skip("program order can be chosen in the interpreter only")
    for seed in range(4):
        problem = random_set(seed, 400)
        with shuffled(seed):
            assert run_tier(tier, problem) == expected(tier, problem)


def pairs_at(threshold: float, rng: np.random.Generator, pairs: int, unit: float) -> Array:
    """Boxes in pairs, [2 p] and [2 p + 1], whose IoU is within some ulp of the threshold.

    Pairs lie in rows of their own, as high as a box is wide.
    """
    wide = (rng.uniform(1, 2, pairs) * unit).astype(np.float32)
    narrow = wide * np.float32(threshold)
    narrow = (narrow.view(np.int32) + rng.integers(-2, 3, pairs, np.int32)).view(np.float32)
    boxes = np.zeros((2 * pairs, 4), np.float32)
    boxes[0::2, 2], boxes[1::2, 2] = wide, narrow
    # Heights that are powers of two round nothing.
    height = np.float32(2.0 ** np.floor(np.log2(unit)))
    boxes[:, 1] = np.arange(2 * pairs) // 2 * 2 * height
    boxes[:, 3] = boxes[:, 1] + height
    return boxes


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("unit", [1.0, 300.0, 2.0**-52, 2.0**-70])
def test_decisions_within_an_ulp_of_the_threshold(tier: str, unit: float) -> None:
    """The kernels do not divide; of the smallest boxes they do, for there products underflow."""
    rng = np.random.default_rng(0)
    decided = set()
    for threshold in (0.5, 0.7, 0.3, 1 / 3, 1.0, 0.0, 2.0**-20, 1e-30, 3e-45):
        boxes = pairs_at(threshold if threshold > 1e-10 else 1e-6, rng, 60, unit)
        scores = np.linspace(1, 0, len(boxes)).astype(np.float32)
        problem = boxes, scores, np.zeros(len(boxes), np.int64), threshold
        want = expected(tier, problem)
        assert run_tier(tier, problem) == want, threshold
        decided |= {i % 2 == 0 or i in want for i in range(len(boxes))}
    assert decided == {True, False}


def test_thresholds_that_are_quotients(kernel: torch.device) -> None:
    """A pair of random boxes, and thresholds around its own IoU."""
    rng = np.random.default_rng(1)
    for _ in range(150):
        corner = rng.uniform(0, 50, (2, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(40, 90, (2, 2))], 1)
        boxes = boxes.astype(np.float32)
        low, high = np.maximum(*boxes[:, :2]), np.minimum(*boxes[:, 2:])
        inter = np.prod(np.maximum(high - low, 0))
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        iou = inter / (area[0] + area[1] - inter)
        for threshold in (np.nextafter(iou, np.float32(0)), iou, np.nextafter(iou, np.float32(1))):
            problem = boxes, np.array([1, 0], np.float32), np.zeros(2, np.int64), float(threshold)
            assert run(kernel, *problem) == [0, *([1] if iou <= threshold else [])]


@pytest.mark.parametrize("tier", TIERS)
def test_a_chain_falls_alternately(tier: str) -> None:
    """Each box overlaps only its neighbours: the fixed point takes as many rounds as it can."""
    n = 300
    x = np.arange(n) * 4.0
    boxes = np.stack([x, 0 * x, x + 10, 0 * x + 10], 1).astype(np.float32)
    scores = np.linspace(1, 0, n).astype(np.float32)
    problem = boxes, scores, np.zeros(n, np.int64), 0.4
    assert run_tier(tier, problem) == list(range(0, n, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype, device: torch.device, rng: np.random.Generator) -> None:
    """The answer of the values as they are rounded, decided in fp32 (fp64 for fp64)."""
    corner = rng.uniform(0, 300, (150, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(20, 200, (150, 2))], 1))
    scores = torch.from_numpy(rng.random(150)).to(dtype)
    boxes = boxes.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = greedy(boxes.to(wide).numpy(), scores.double().numpy(), np.zeros(150), 0.5)
    assert nms(boxes.to(device), scores.to(device), 0.5).tolist() == want


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("score_threshold", [None, 0.0, 0.7])
@pytest.mark.parametrize("max_output", [None, 0, 7, 10**6])
def test_options(
    offset: int, score_threshold: float | None, max_output: int | None, device: torch.device
) -> None:
    boxes, scores, idxs, _ = random_set(35, 300)
    scores[::7] = 0.7
    options = {"offset": offset, "score_threshold": score_threshold, "max_output": max_output}
    got = run(device, boxes, scores, idxs % 3, 0.2, **options)
    assert got == greedy(boxes, scores, idxs % 3, 0.2, **options)  # type: ignore[arg-type]


# ---- the peers


@pytest.mark.parametrize(("case", "arrays"), peers.cases("nms"))
def test_agrees_with_the_peers(case: Any, arrays: dict[str, Any], device: torch.device) -> None:
    threshold = case["args"]["iou_threshold"]
    boxes, scores = (torch.from_numpy(arrays[k]).to(device) for k in ("boxes", "scores"))
    assert nms(boxes, scores, threshold).tolist() == arrays["keep32"].tolist()
    offset1 = nms(boxes, scores, threshold, offset=1)
    assert offset1.tolist() == arrays["keep_offset1"].tolist()
    if "keep64" in arrays:
        got = nms(boxes.double(), scores.double(), threshold)
        assert got.tolist() == arrays["keep64"].tolist()


@pytest.mark.parametrize(("case", "arrays"), peers.cases("batched_nms"))
def test_batched_agrees_with_the_peers(
    case: Any, arrays: dict[str, Any], device: torch.device
) -> None:
    arguments = *(arrays[k] for k in ("boxes", "scores", "idxs")), case["args"]["iou_threshold"]
    assert run(device, *arguments) == arrays["keep32"].tolist()


@pytest.mark.parametrize(("case", "arrays"), peers.cases("nms_options"))
def test_options_agree_with_the_peers(
    case: Any, arrays: dict[str, Any], device: torch.device
) -> None:
    args = case["args"]
    got = nms(
        torch.from_numpy(arrays["boxes"]).to(device),
        torch.from_numpy(arrays["scores"]).to(device),
        args["iou_threshold"],
        offset=args["offset"],
        score_threshold=args["score_threshold"],
        max_output=args["max_num"],
    )
    assert got.tolist() == arrays["keep"].tolist()


# ---- properties and edges


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_kept_boxes_are_apart_and_dropped_ones_have_a_reason(seed: int) -> None:
    boxes, scores, idxs, threshold = random_set(seed, 120)
    kept = run(torch.device("cpu"), boxes, scores, idxs, threshold)
    order = greedy(boxes, scores, np.arange(len(boxes)), threshold)
    rank = {i: r for r, i in enumerate(order)}
    assert sorted(kept, key=rank.__getitem__) == kept
    for i in range(len(boxes)):
        pair = [
            greedy(boxes[[j, i]], np.array([1.0, 0.0]), idxs[[j, i]], threshold)
            for j in kept
            if rank[j] < rank[i]
        ]
        assert (i in kept) == all(p == [0, 1] for p in pair)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_the_input_does_not_matter(seed: int) -> None:
    boxes, scores, idxs, threshold = random_set(seed, 100)
    scores = np.random.default_rng(seed).permutation(len(boxes)).astype(np.float32)
    shuffle = np.random.default_rng(seed + 1).permutation(len(boxes))
    want = run(torch.device("cpu"), boxes, scores, idxs, threshold)
    got = run(torch.device("cpu"), boxes[shuffle], scores[shuffle], idxs[shuffle], threshold)
    assert shuffle[got].tolist() == want


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e30, math.inf])
def test_batched_is_nms_of_each_class_alone(scale: float, device: torch.device) -> None:
    boxes, scores, idxs, _ = random_set(8, 400)
    if math.isinf(scale):
        boxes[::9, 2] = math.inf
        boxes[4::9, :2] = -math.inf
    else:
        boxes = boxes * np.float32(scale)
    idxs = idxs % 5
    kept = run(device, boxes, scores, idxs, 0.3)
    for c in range(5):
        of_class = np.flatnonzero(idxs == c)
        x, s = (torch.from_numpy(a[of_class]).to(device) for a in (boxes, scores))
        alone = of_class[nms(x, s, 0.3).cpu().numpy()]
        assert [i for i in kept if idxs[i] == c] == alone.tolist()


def test_int32_classes_and_more_than_anybody_has(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(300, 1)
    idxs = (torch.arange(300, device=device) % 150 * 77_777_777).int()
    kept = batched_nms(boxes, torch.ones(300, device=device), idxs, 0.5)
    assert kept.tolist() == list(range(150))


def test_iou_equal_to_the_threshold_is_kept(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]], device=device)
    scores = torch.tensor([1.0, 0.5], device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.49999997).tolist() == [0]
    # The threshold is rounded to fp32, up for 0.1 and down for 0.7; the IoU only for fp32 boxes.
    for threshold, height, of_fp32, of_fp64 in (
        (0.1, 1.0, [0, 1], [0, 1]),
        (0.1, 1.000000005, [0, 1], [0, 1]),
        (0.7, 7.0, [0, 1], [0]),
    ):
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, height]], dtype=torch.float64)
        boxes = boxes.to(device)
        assert nms(boxes.float(), scores, threshold).tolist() == of_fp32
        assert nms(boxes, scores, threshold).tolist() == of_fp64


def test_fp64_scores_are_sorted_as_such(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(2, 1)
    scores = torch.tensor([1, 1 + 1e-12], dtype=torch.float64, device=device)
    assert nms(boxes, scores, 0.5).tolist() == [1]


def test_stable_ties_signed_zeros_and_nan_last(device: torch.device) -> None:
    boxes = torch.arange(6.0, device=device)[:, None] * 100 + torch.tensor(
        [0.0, 0, 5, 5], device=device
    )
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([0.0, nan, -0.0, -inf, 0.0, inf], device=device)
    assert nms(boxes, scores, 0.5).tolist() == [5, 0, 2, 4, 3, 1]
    assert nms(boxes, scores, 0.5, score_threshold=-1).tolist() == [5, 0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_score_threshold_is_compared_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6]], device=device)
    scores = torch.tensor([0.3, 0.2], dtype=dtype, device=device)
    want = [0] if float(scores[0]) > 0.3 else []
    assert nms(boxes, scores, 0.5, score_threshold=0.3).tolist() == want
    assert nms(boxes, scores, 0.5, score_threshold=1e300).tolist() == []


def test_nan_scores_of_either_sign_sort_last(device: torch.device) -> None:
    n = 5000
    boxes = torch.arange(n, device=device)[:, None] * 10.0 + torch.tensor(
        [0.0, 0, 5, 5], device=device
    )
    scores = torch.linspace(1, -1, n, dtype=torch.float64)
    scores[::10] = math.nan
    scores[5::10] = -math.nan
    scores[5::10] = scores[5::10].copysign(torch.tensor(-1.0))
    bad = scores.isnan().nonzero()[:, 0].tolist()
    for dtype in (torch.float32, torch.float64):
        kept = nms(boxes[:40], scores[:40].to(dtype).to(device), 0.5).tolist()
        assert kept[-8:] == [i for i in bad if i < 40]
    if device.type == "cuda":
        assert nms(boxes, scores.to(device), 0.5).tolist()[-len(bad) :] == bad


def test_empty_and_strided(device: torch.device) -> None:
    empty = nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)
    assert (empty.shape, empty.dtype, empty.device.type) == ((0,), torch.int64, device.type)
    boxes, scores, idxs, _ = random_set(35, 300)
    wide = torch.from_numpy(boxes.repeat(2, 0)).to(device)[::2]
    tall = torch.from_numpy(np.asfortranarray(boxes)).to(device)
    same = torch.from_numpy(scores).to(device)[:1].expand(len(boxes))
    for b in (wide, tall):
        assert nms(b, torch.from_numpy(scores).to(device), 0.3).tolist() == greedy(
            boxes, scores, 0 * idxs, 0.3
        )
        assert nms(b, same, 0.3).tolist() == greedy(boxes, 0 * scores, 0 * idxs, 0.3)


def test_inputs_may_require_gradients_and_stay_as_they_are(device: torch.device) -> None:
    boxes = torch.rand(50, 4, device=device).cumsum(1).requires_grad_()
    scores = torch.rand(50, device=device, requires_grad=True)
    before = boxes.detach().clone(), scores.detach().clone()
    kept = nms(boxes, scores, 0.2)
    assert not kept.requires_grad
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def test_reference_is_the_definition() -> None:
    """Without torch in between, for the reference is also the oracle of others."""
    boxes, scores, idxs, _ = random_set(35, 300)
    got = reference.nms(boxes, scores, 0.3, idxs=idxs % 4, max_output=20)
    assert got.tolist() == greedy(boxes, scores, idxs % 4, 0.3, max_output=20)


def box(**change: Any) -> dict[str, Any]:
    return {
        "boxes": torch.zeros(3, 4),
        "scores": torch.zeros(3),
        "idxs": torch.zeros(3, dtype=torch.int64),
        "iou_threshold": 0.5,
    } | change


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (box(boxes=[[0, 0, 1, 1]]), TypeError, "boxes must be a torch.Tensor, got list"),
        (box(boxes=torch.zeros(3, 5)), ValueError, r"boxes must have shape \[N, 4\].*\(3, 5\)"),
        (box(boxes=torch.zeros(1, 3, 4)), ValueError, r"boxes .*got \(1, 3, 4\)"),
        (box(boxes=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "boxes .*got torch.int32"),
        (box(scores=torch.zeros(2)), ValueError, r"scores must have shape \(3,\).*got \(2,\)"),
        (box(scores=torch.zeros(3, 1)), ValueError, r"scores .*got \(3, 1\)"),
        (box(scores=torch.zeros(3, dtype=torch.int64)), TypeError, "scores .*got torch.int64"),
        (box(scores=torch.zeros(3, device="meta")), ValueError, "device of boxes, cpu, got meta"),
        (box(idxs=torch.zeros(3)), TypeError, "idxs .*int64, int32, got torch.float32"),
        (box(idxs=None), TypeError, "idxs must be a torch.Tensor, got NoneType"),
        (box(iou_threshold=1.5), ValueError, r"iou_threshold must be in \[0, 1\], got 1.5"),
        (box(iou_threshold=-0.1), ValueError, "iou_threshold .*got -0.1"),
        (box(iou_threshold=math.nan), ValueError, "iou_threshold .*got nan"),
        (box(iou_threshold="0.5"), TypeError, "iou_threshold must be a number .*got str"),
        (box(offset=2), ValueError, "offset must be one of 0, 1, got 2"),
        (box(score_threshold=math.inf), ValueError, "score_threshold must be finite, got inf"),
        (box(offset=torch.tensor(1)), ValueError, "offset must be one of 0, 1, got tensor"),
        (box(max_output=2**70), ValueError, "max_output must be None or .*got 11805916"),
        (box(max_output=-1), ValueError, "max_output must be None or .*got -1"),
        (box(max_output=2.5), TypeError, "max_output must be None or .*got 2.5"),
    ],
)
def test_rejected(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batched_nms(**arguments)


@pytest.mark.parametrize(("n", "bands"), [(24_576, 1), (100_000, 25), (1_000_000, 76)])
def test_memory_is_linear(n: int, bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 64 bytes per box beside the inputs, what torch takes to sort and select included."""
    launches: list[str] = []
    monkeypatch.setattr(
        _dispatch, "launch", lambda kernel, *_, **__: launches.append(kernel.fn.__name__)
    )
    boxes, scores = torch.zeros(n, 4), torch.linspace(1, 0, n)
    with memory() as used:
        kept = module._launch(boxes, scores, None, 0.5, 0, None, None)
    assert len(kept) == n  # the most that a result can take
    assert launches.count("nms_mask_kernel") == launches.count("nms_resolve_kernel") == bands
    assert launches.count("nms_suppress_kernel") == bands - 1
    assert bands == 1 or 32 * n < used.peak <= 64 * n
