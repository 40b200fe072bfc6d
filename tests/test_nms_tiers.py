"""Every tier of NMS: the same indices, whatever way they are found."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlops_triton import _dispatch, _settings
from dlops_triton import _nms as launchers
from tests.nms_sets import Array, greedy, random_set
from tests.tools.host_cost import memory
from tests.tools.interpreter import shuffled

# The function of the same name hides the module from an import statement.
module = importlib.import_module("dlops_triton.nms")

KERNEL = torch.device("cpu" if _dispatch.INTERPRETED else "cuda")

# Name: tier, whether it takes classes, and module attributes and settings that make it work hard.
TIERS: dict[str, tuple[str, bool, dict[str, Any], dict[str, dict[str, int]]]] = {
    "small": ("small", False, {}, {}),
    "small, classes": ("small", True, {}, {"nms_small": {"BLOCK": 64}}),
    "segments": ("segments", False, {}, {"nms_segments": {"BLOCK": 64}}),
    "segments, classes": ("segments", True, {}, {"nms_segments": {"CHUNK": 16}}),
    "segments, large ones": ("segments", True, {"LARGEST_SEGMENT": 12}, {}),
    "one band": ("bands", False, {}, {"nms_mask": {"BLOCK": 64, "ROWS": 8}}),
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
    problem = random_set(seed, int(rng.choice([10, 40, 40, 100, 300])))
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
    n = 2048 if tier.startswith("small") else 4096 if "large" in tier else 2100
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
    """The kernels do not divide; of the smallest boxes they scale what would underflow."""
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


@pytest.mark.parametrize("tier", TIERS)
def test_a_chain_falls_alternately(tier: str) -> None:
    """Each box overlaps only its neighbours: the fixed point takes as many rounds as it can."""
    n = 300
    x = np.arange(n) * 4.0
    boxes = np.stack([x, 0 * x, x + 10, 0 * x + 10], 1).astype(np.float32)
    scores = np.linspace(1, 0, n).astype(np.float32)
    problem = boxes, scores, np.zeros(n, np.int64), 0.4
    assert run_tier(tier, problem) == list(range(0, n, 2))


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
