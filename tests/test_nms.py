"""NMS: exact indices, from the definition, the peers, and across implementations."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dlops_triton import _dispatch, _settings, batched_nms, nms
from dlops_triton.reference import nms as reference
from tests import peers
from tests.tools.interpreter import shuffled

# The function of the same name hides the module from an import statement.
module = importlib.import_module("dlops_triton.nms")

Array = NDArray[Any]
THRESHOLDS = [0.0, 0.5, 1.0, 0.3]
SETS, CHUNKS = 2000, 20


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
    """2,000 sets, up to 3,000 boxes; smaller where the kernels are interpreted."""
    interpreted = device.type == "cpu" and _dispatch.cpu_implementation == "kernel"
    # Fewer, larger steps: the interpreter's pace.
    rows = {"ROWS": 32} if interpreted else {}
    with _settings.override("nms_mask", **rows):
        for seed in range(chunk, SETS, CHUNKS):
            problem = random_set(seed, 150 if interpreted else 3000)
            assert run(device, *problem) == greedy(*problem), f"seed {seed}"


@pytest.mark.parametrize("seed", range(12))
def test_blocks_and_bands(seed: int, kernel: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that boxes suppress one another across words, blocks and bands."""
    monkeypatch.setattr(module, "BAND", 128)
    rng = np.random.default_rng(seed)
    n = [64, 65, 127, 128, 129, 192, 256, 257, 300, 383, 385, 400][seed]
    corner = rng.uniform(0, [20, 200, 2000][seed % 3], (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (n, 2))], 1).astype(np.float32)
    problem = boxes, rng.random(n).astype(np.float32), rng.integers(0, 1 + seed % 2 * 3, n), 0.4
    with (
        _settings.override("nms_mask", BLOCK=64, ROWS=16, num_warps=2),
        _settings.override("nms_resolve", WORDS=2, num_warps=2),
        _settings.override("nms_suppress", BLOCK=32, ROWS=16, WORDS=2, num_warps=1) as suppress,
    ):
        assert run(kernel, *problem) == greedy(*problem)
        if kernel.type == "cpu":
            with shuffled(seed):
                assert run(kernel, *problem) == greedy(*problem)
    assert (suppress.launches > 0) == (n > 128)


def test_a_chain_falls_alternately(kernel: torch.device) -> None:
    """Each box overlaps only its neighbours: the fixed point takes as many rounds as it can."""
    n = 600
    x = np.arange(n) * 4.0
    boxes = np.stack([x, 0 * x, x + 10, 0 * x + 10], 1).astype(np.float32)
    scores = np.linspace(1, 0, n).astype(np.float32)
    assert run(kernel, boxes, scores, np.zeros(n, np.int64), 0.4) == list(range(0, n, 2))


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


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e30])
def test_batched_is_nms_of_each_class_alone(scale: float, device: torch.device) -> None:
    boxes, scores, idxs, _ = random_set(8, 400)
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


def test_memory_does_not_grow_with_the_square(
    kernel: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the launcher allocates beside the boxes, for a million of them: a band's bitmask."""
    allocated = 0
    new_empty = Tensor.new_empty

    def counted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal allocated
        result = new_empty(self, *args, **kwargs)
        allocated += result.nbytes
        return result

    launches = []
    monkeypatch.setattr(Tensor, "new_empty", counted)
    monkeypatch.setattr(_dispatch, "launch", lambda kernel, *_, **__: launches.append(kernel))
    n = 1_000_000
    keep = torch.ones(n, dtype=torch.int8, device=kernel)
    module._suppress(torch.zeros(n, 4, device=kernel), None, keep, 0.5, 0)
    assert allocated <= module.BAND**2 / 8 + module.BAND / 8
    assert len(launches) == 3 * math.ceil(n / module.BAND) - 1
