"""Soft-NMS: the sequential definition, the peers, and the kernel against both."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dlops_triton import _dispatch, _settings, nms, soft_nms, soft_nms_padded
from dlops_triton.reference import soft_nms as reference
from tests import peers
from tests.nms_sets import random_set
from tests.soft_nms_checks import check, until_rounding_decides
from tests.tools.interpreter import shuffled

# The function of the same name hides the module from an import statement.
module = importlib.import_module("dlops_triton.soft_nms")

Array = NDArray[Any]
METHODS = ["gaussian", "linear", "hard"]
CLASSIC = (
    np.array(
        [
            [200, 200, 400, 400],
            [220, 220, 420, 420],
            [240, 200, 440, 400],
            [200, 240, 400, 440],
            [1, 1, 2, 2],
        ],
        np.float32,
    ),
    np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32),
)


def run(
    device: torch.device, boxes: Array, scores: Array, *args: Any, idxs: Any = None, **options: Any
) -> tuple[list[int], Array]:
    x, s = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (boxes, scores))
    ids = None if idxs is None else torch.from_numpy(idxs).to(device)
    indices, decayed = soft_nms(x, s, *args, idxs=ids, **options)
    assert (indices.dtype, decayed.dtype) == (torch.int64, s.dtype)
    return indices.tolist(), decayed.double().cpu().numpy()


def random_boxes(rng: np.random.Generator, n: int, side: float = 100) -> tuple[Array, Array]:
    corner = rng.uniform(0, side, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (n, 2))], 1)
    return boxes.astype(np.float32), rng.random(n).astype(np.float32)


# ---- the definition


def test_by_hand(device: torch.device) -> None:
    """Two boxes of IoU 1/3 and one apart."""
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [50, 50, 60, 60]], np.float32)
    scores = np.array([0.5, 1.0, 0.25], np.float32)
    for method, decayed in (
        ("gaussian", 0.5 * math.exp(-1 / 9 / 0.5)),
        ("linear", 0.5 * (1 - 1 / 3)),
        ("hard", None),
    ):
        indices, values = run(device, boxes, scores, 0.3, 0.5, 0.001, method)
        assert indices == ([1, 0, 2] if decayed else [1, 2])
        np.testing.assert_allclose(values, [1.0, *([decayed] if decayed else []), 0.25], rtol=1e-6)
        # Not above the threshold of the IoU.
        unchanged = run(device, boxes, scores, 0.4, 0.5, 0.001, method)
        assert method == "gaussian" or unchanged == ([1, 0, 2], pytest.approx([1, 0.5, 0.25]))


def test_the_classic_example(device: torch.device) -> None:
    indices, values = run(device, *CLASSIC, offset=1)
    assert indices == [0, 4, 1, 2, 3]
    np.testing.assert_allclose(
        values, [0.9, 0.5, 0.31561778, 0.11311663, 0.06206052], rtol=0, atol=3e-8
    )


@pytest.mark.parametrize(("case", "arrays"), peers.cases("soft_nms"))
@pytest.mark.parametrize("offset", [0, 1])
def test_agrees_with_the_peers(
    case: Any, arrays: dict[str, Any], offset: int, device: torch.device
) -> None:
    indices, values = run(device, arrays["boxes"], arrays["scores"], **case["args"], offset=offset)
    if np.isnan(arrays[f"scores_offset{offset}_32"]).any():  # of two boxes without area; ours stay
        assert values.tolist() == sorted(arrays["scores"].tolist(), reverse=True)
        return
    assert indices == arrays[f"keep_offset{offset}"].tolist()
    np.testing.assert_allclose(values, arrays[f"scores_offset{offset}_32"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=268)  # gaussian: scores fade to subnormal ones, the last to less than half a step
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_matches_the_definition(method: str, seed: int) -> None:
    """200 sets a method, of one or several sweeps; 5,000 with --hypothesis-profile=thorough."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, rng.choice([5, 80, 200])))
    boxes, scores = random_boxes(rng, n, float(rng.choice([20, 100, 1000])))
    idxs = rng.integers(-2, 3, n) if rng.random() < 0.5 else None
    options = {
        "sigma": float(rng.choice([0.5, 0.3, 1.0])),
        "score_threshold": float(rng.choice([0.0, 0.001, 0.2])),
        "max_output": int(rng.integers(0, n + 2)) if rng.random() < 0.3 else None,
        "offset": int(rng.integers(0, 2)),
    }
    kernel = torch.device("cpu" if _dispatch.INTERPRETED else "cuda")
    with _settings.override("soft_nms", SIZE=int(rng.choice([32, 1024])), CHUNK=16):
        got = run(kernel, boxes, scores, 0.3, method=method, idxs=idxs, **options)
    want = reference.soft_nms(boxes, scores, 0.3, method=method, idxs=idxs, **options)  # type: ignore[arg-type]
    del options["max_output"]
    got, want = until_rounding_decides(
        *(got, want, boxes, scores, idxs),
        method=method,
        **options,  # type: ignore[arg-type]
    )
    check(got, want, boxes, idxs, options["offset"])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(20))
def test_bad_boxes_among_good_ones(method: str, seed: int, kernel: torch.device) -> None:
    """NaN, infinite, huge, inverted and empty boxes, classes of any size, scores that are tied."""
    boxes, scores, idxs, _ = random_set(seed, 100)
    scores = np.abs(scores)
    with _settings.override("soft_nms", SIZE=32):
        got = run(kernel, boxes, scores, 0.3, method=method, idxs=idxs)
    want = reference.soft_nms(boxes, scores, 0.3, method=method, idxs=idxs)
    # Equal products of different factors may be rounded apart, and change places.
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    place = {int(i): value for i, value in zip(*want, strict=True)}
    for i, value in zip(*got, strict=True):
        assert place[i] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_every_dtype(dtype: torch.dtype, method: str, device: torch.device) -> None:
    boxes, scores = (torch.from_numpy(a) for a in random_boxes(np.random.default_rng(1), 60))
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = reference.soft_nms(boxes.to(wide).numpy(), scores.to(wide).numpy(), method=method)
    indices, values = soft_nms(boxes.to(device), scores.to(device), method=method)  # type: ignore[arg-type]
    assert values.dtype == dtype
    assert indices.tolist() == want[0].tolist()
    rounded = torch.from_numpy(want[1]).to(wide).to(dtype)
    torch.testing.assert_close(
        values.cpu(), rounded, rtol={8: 1e-12, 4: 1e-5}.get(dtype.itemsize, 0.01), atol=0
    )


def test_hard_is_nms(device: torch.device) -> None:
    for seed in range(10):
        boxes, scores, _, threshold = random_set(seed, 200)
        scores = np.abs(np.nan_to_num(scores)) + np.float32(0.5)
        x, s = (torch.from_numpy(a).to(device) for a in (boxes, scores))
        indices, values = soft_nms(x, s, threshold, method="hard")
        assert torch.equal(indices, nms(x, s, threshold))
        assert torch.equal(values, s[indices].clamp(max=torch.finfo(torch.float32).max))


def test_large_sets_take_several_sweeps(kernel: torch.device) -> None:
    """The same scores to the last bit, whatever is in registers at a time."""
    boxes, scores = random_boxes(np.random.default_rng(2), 700, 300)
    want = None
    for size in (32, 256, 1024):
        with _settings.override("soft_nms", SIZE=size):
            got = run(kernel, boxes, scores, max_output=150)
        assert want is None or (got[0], got[1].tolist()) == want
        want = (got[0], got[1].tolist())
    check(got, reference.soft_nms(boxes, scores, max_output=150), boxes)


def test_equal_scores_go_by_index(kernel: torch.device) -> None:
    boxes, _ = random_boxes(np.random.default_rng(3), 300, 3000)
    boxes[::7] = boxes[0]
    scores = np.full(300, 0.5, np.float32)
    for size in (32, 1024):
        with _settings.override("soft_nms", SIZE=size):
            got = run(kernel, boxes, scores, method="hard")
        assert got[0] == reference.soft_nms(boxes, scores, method="hard")[0].tolist()


def test_equal_scores_outside_of_the_registers_go_by_index(kernel: torch.device) -> None:
    """32 and 40 are equal; 40 is the best of its lane, 32 is behind 0 until that is taken."""
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (64, 1))
    boxes += 20 * np.arange(64, dtype=np.float32)[:, None]
    scores = np.full(64, 0.01, np.float32)
    scores[[0, 32, 40]] = 0.9, 0.5, 0.5
    with _settings.override("soft_nms", SIZE=32):
        assert run(kernel, boxes, scores, max_output=2)[0] == [0, 32]


def test_classes_are_sets_of_their_own(device: torch.device) -> None:
    rng = np.random.default_rng(4)
    boxes, scores = random_boxes(rng, 90)
    idxs = rng.integers(0, 4, 90) * 2**40 - 2**41
    indices, values = run(device, boxes, scores, idxs=idxs)
    assert (np.diff(values) <= 0).all()
    for c in np.unique(idxs):
        of_class = np.flatnonzero(idxs == c)
        alone = run(device, boxes[of_class], scores[of_class])
        mine = [k for k, i in enumerate(indices) if idxs[i] == c]
        assert [indices[k] for k in mine] == of_class[alone[0]].tolist()
        assert values[mine].tolist() == alone[1].tolist()


def test_order_of_programs_does_not_matter(kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    rng = np.random.default_rng(5)
    boxes, scores = random_boxes(rng, 200)
    idxs = rng.integers(0, 9, 200)
    want = run(kernel, boxes, scores, idxs=idxs)
    with shuffled(1):
        got = run(kernel, boxes, scores, idxs=idxs)
    assert (got[0], got[1].tolist()) == (want[0], want[1].tolist())


def test_a_score_at_the_threshold_is_not_taken(device: torch.device) -> None:
    """0.5 decays to 0.25 exactly, for the IoU is 1/2."""
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)
    scores = np.array([0.9, 0.5], np.float32)
    for lowest, want in ((0.25, [0]), (0.2499, [0, 1])):
        assert run(device, boxes, scores, 0.3, 0.5, lowest, "linear")[0] == want


def test_what_has_decayed_to_nothing_is_not_taken(kernel: torch.device) -> None:
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (60, 1))
    idxs = np.arange(60) % 3
    scores = np.linspace(1, 0.1, 60).astype(np.float32)
    with _settings.override("soft_nms", SIZE=32):
        got = run(kernel, boxes, scores, 0.3, 0.5, 0.0, "hard", idxs=idxs)
    assert got[0] == [0, 1, 2]


# ---- bad data and edges


def test_scores_that_never_take_part(device: torch.device) -> None:
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (6, 1)) + 20 * np.arange(6)[:, None]
    scores = np.array([0.001, math.nan, -1, math.inf, 0.5, -math.inf], np.float32)
    indices, values = run(device, boxes.astype(np.float32), scores)
    assert indices == [3, 4]  # 0.001 is not above the threshold
    assert values.tolist() == [np.finfo(np.float32).max, 0.5]


def test_an_infinite_score_spoils_nothing(device: torch.device) -> None:
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (3, 1))
    scores = np.array([math.inf, math.inf, 0.5], np.float32)
    assert run(device, boxes, scores, 0.3, method="hard")[0] == [0]


def test_empty_and_strided(device: torch.device) -> None:
    empty = soft_nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device))
    assert [tuple(t.shape) for t in empty] == [(0,), (0,)]
    assert (empty[0].dtype, empty[1].dtype) == (torch.int64, torch.float32)
    boxes, scores = random_boxes(np.random.default_rng(6), 50)
    want = reference.soft_nms(boxes, scores)
    tall = torch.from_numpy(np.asfortranarray(boxes)).to(device)
    wide = torch.from_numpy(scores.repeat(2)).to(device)[::2]
    indices, values = soft_nms(tall, wide)
    check((indices.tolist(), values.double().cpu().numpy()), want, boxes)


def test_inputs_may_require_gradients_and_stay_as_they_are(device: torch.device) -> None:
    x, s = (torch.from_numpy(a).to(device) for a in CLASSIC)
    before = x.clone(), s.clone()
    _, values = soft_nms(x.requires_grad_(), s.requires_grad_())
    padded = soft_nms_padded(x[None], s[None], max_output=3)
    assert not values.requires_grad
    assert not padded[1].requires_grad
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(s.detach(), before[1])


# ---- fixed size


def check_padded(
    padded: tuple[Tensor, Tensor, Tensor], images: list[tuple[Tensor, Tensor]], max_output: int
) -> None:
    """Image by image what `soft_nms` gives, then -1."""
    indices, values, counts = padded
    assert counts.dtype == torch.int32
    for b, (index, value) in enumerate(images):
        k = len(index)
        assert counts[b].item() == k
        assert torch.equal(indices[b, :k], index)
        assert torch.equal(values[b, :k], value)
        assert bool((indices[b, k:] == -1).all())
        assert bool((values[b, k:] == -1).all())
        assert indices.shape[1] == values.shape[1] == max_output


@pytest.mark.parametrize("max_output", [0, 7, 40, 100])
@pytest.mark.parametrize("classes", [False, True])
def test_padded_is_each_image_alone(classes: bool, max_output: int, device: torch.device) -> None:
    rng = np.random.default_rng(7)
    sets = [random_boxes(rng, 40) for _ in range(4)]
    boxes, scores = (torch.from_numpy(np.stack(a)).to(device) for a in zip(*sets, strict=True))
    idxs = torch.from_numpy(rng.integers(0, 3, (4, 40))).to(device) if classes else None
    valid = torch.tensor([40, 0, 17, 99], device=device, dtype=torch.int32)
    options: dict[str, Any] = {"score_threshold": 0.1, "max_output": max_output}
    padded = soft_nms_padded(boxes, scores, idxs=idxs, valid=valid, **options)
    images = []
    for b, n in enumerate((40, 0, 17, 40)):
        ids = None if idxs is None else idxs[b, :n]
        images.append(soft_nms(boxes[b, :n], scores[b, :n], idxs=ids, **options))
    check_padded(padded, images, max_output)


def test_padded_of_images_that_lie_side_by_side(kernel: torch.device) -> None:
    """[N, B] in memory: whatever torch makes of the scores keeps that order."""
    rng = np.random.default_rng(9)
    sets = [random_boxes(rng, 60) for _ in range(3)]
    boxes, scores = (torch.from_numpy(np.stack(a)).to(kernel) for a in zip(*sets, strict=True))
    idxs = torch.from_numpy(rng.integers(0, 3, (3, 60))).to(kernel)
    beside = [x.mT.contiguous().mT for x in (scores, idxs)]
    for ids in (None, idxs):
        want = soft_nms_padded(boxes, scores, idxs=ids, max_output=60)
        got = soft_nms_padded(
            boxes, beside[0], idxs=None if ids is None else beside[1], max_output=60
        )
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_padded_of_nothing(device: torch.device) -> None:
    scores = torch.full((2, 5), 0.2, device=device)
    boxes = torch.rand(2, 5, 4, device=device)
    dropped = soft_nms_padded(boxes, scores, score_threshold=0.2, max_output=3)
    none = soft_nms_padded(boxes[:, :0], scores[:, :0], max_output=3)
    for indices, values, counts in (dropped, none):
        assert indices.tolist() == [[-1] * 3] * 2
        assert values.tolist() == [[-1.0] * 3] * 2
        assert counts.tolist() == [0, 0]
    assert soft_nms_padded(boxes[:0], scores[:0], max_output=3)[0].shape == (0, 3)


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, None)])
def test_padded_under_vmap(dims: tuple[int, int | None], device: torch.device) -> None:
    rng = np.random.default_rng(8)
    boxes, scores = random_boxes(rng, 3 * 2 * 20)
    x = torch.from_numpy(boxes).view(3, 2, 20, 4).to(device)
    s = torch.from_numpy(scores).view(3, 2, 20).to(device)
    want = [soft_nms_padded(x[v], s[v if dims[1] == 0 else 0], max_output=9) for v in range(3)]
    if dims[1] is None:
        s = s[0]
    got = torch.vmap(lambda a, b: soft_nms_padded(a, b, max_output=9), in_dims=dims)(
        x.movedim(0, dims[0]), s
    )
    for out, each in zip(got, zip(*want, strict=True), strict=True):
        assert torch.equal(out, torch.stack(each))


def problem(**change: Any) -> dict[str, Any]:
    return {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3)} | change


def images(**change: Any) -> dict[str, Any]:
    return {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3), "max_output": 2} | change


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (problem(boxes=None), TypeError, "boxes must be a torch.Tensor, got NoneType"),
        (problem(boxes=torch.zeros(3, 5)), ValueError, r"boxes must have shape \[N, 4\].*\(3, 5\)"),
        (problem(scores=[1, 2, 3]), TypeError, "scores must be a torch.Tensor, got list"),
        (problem(scores=torch.zeros(2)), ValueError, r"scores must have shape \(3,\).*got \(2,\)"),
        (problem(scores=torch.zeros(3).int()), TypeError, "scores .*got torch.int32"),
        (problem(idxs=torch.zeros(3)), TypeError, "idxs .*got torch.float32"),
        (problem(idxs=torch.zeros(2).long()), ValueError, r"idxs must have shape \(3,\)"),
        (problem(scores=torch.zeros(3, device="meta")), ValueError, "device of boxes, cpu"),
        (problem(iou_threshold=1.1), ValueError, r"iou_threshold must be in \[0, 1\], got 1.1"),
        (problem(sigma=0), ValueError, "sigma must be above 0 and finite, got 0"),
        (problem(sigma=math.inf), ValueError, "sigma must be above 0 and finite, got inf"),
        (problem(sigma="x"), TypeError, "sigma must be a number .*got str"),
        (problem(score_threshold=-0.1), ValueError, "score_threshold must be at least 0.*got -0.1"),
        (problem(score_threshold=math.nan), ValueError, "score_threshold must be .*got nan"),
        (problem(method="naive"), ValueError, "method must be one of 'gaussian', .*got 'naive'"),
        (problem(offset=2), ValueError, "offset must be one of 0, 1, got 2"),
        (problem(max_output=-1), ValueError, "max_output must be None or .*got -1"),
        (images(boxes=torch.zeros(3, 4)), ValueError, r"boxes must have shape \[B, N, 4\]"),
        (
            images(valid=torch.zeros(3).int()),
            ValueError,
            r"valid must have shape \(2,\), one per im",
        ),
        (images(valid=torch.zeros(2)), TypeError, "valid .*got torch.float32"),
        (images(max_output=None), TypeError, "max_output must be an integer .*got None"),
        (images(max_output=-1), ValueError, "max_output must be an integer .*got -1"),
        (images(max_output=2**31), ValueError, "max_output must be an integer in .*got 2147483648"),
    ],
)
def test_rejected(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    scores = arguments["scores"]
    op: Any = soft_nms_padded if isinstance(scores, Tensor) and scores.dim() == 2 else soft_nms
    with pytest.raises(error, match=message):
        op(**arguments)
