"""NMS: exact indices, from the definition, the peers, and across implementations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dlops_triton import _dispatch, batched_nms, nms
from dlops_triton.reference import nms as reference
from tests import peers
from tests.nms_sets import greedy, random_set

Array = NDArray[Any]
SETS, CHUNKS = 2000, 20


def run(device: torch.device, *arrays: Any, **options: Any) -> list[int]:
    boxes, scores, idxs = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays[:3])
    kept = batched_nms(boxes, scores, idxs, arrays[3], **options)
    assert kept.dtype == torch.int64
    return kept.tolist()  # type: ignore[no-any-return]


# ---- the definition


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sets(chunk: int, device: torch.device) -> None:
    """2,000 sets, up to 1,500 boxes; where the kernels are interpreted 200, up to 150."""
    interpreted = device.type == "cpu" and _dispatch.cpu_implementation == "kernel"
    step = CHUNKS * (10 if interpreted else 1)
    for seed in range(chunk, SETS, step):
        problem = random_set(seed, 150 if interpreted else 1500)
        assert run(device, *problem) == greedy(*problem), f"seed {seed}"


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
        (
            box(
                boxes=torch.zeros(2**31, 4, device="meta"),
                scores=torch.zeros(2**31, device="meta"),
                idxs=torch.zeros(2**31, device="meta", dtype=torch.int32),
            ),
            ValueError,
            "boxes must be fewer than .*got 2147483648",
        ),
        (box(max_output=2**70), ValueError, "max_output must be None or .*got 11805916"),
        (box(max_output=-1), ValueError, "max_output must be None or .*got -1"),
        (box(max_output=2.5), TypeError, "max_output must be None or .*got 2.5"),
    ],
)
def test_rejected(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batched_nms(**arguments)
