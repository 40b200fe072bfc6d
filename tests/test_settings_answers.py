"""That no answer hangs on the launch settings."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np
import pytest
import torch

import dlops_triton
from dlops_triton import (
    _nms,
    box_iou,
    box_match,
    complete_box_iou,
    complete_box_iou_loss,
    deform_conv2d,
    deform_sample,
    sigmoid_focal_loss,
    soft_nms,
)
from dlops_triton._settings import override
from tests.arrays import numpy
from tests.tolerances import assert_close

NMS: Any = sys.modules[dlops_triton.nms.__module__]

# Without iou_bwd and penalty_bwd, whose sums may be rounded otherwise.
OTHER = {
    "focal_fwd": {"BLOCK": 64, "num_warps": 1},
    "focal_bwd": {"BLOCK": 128, "num_warps": 1},
    "focal_sum": {"BLOCK": 128, "BLOCKS": 1000, "num_warps": 2},
    "iou_fwd": {"BLOCK_N": 4, "BLOCK_M": 16, "num_warps": 1},
    "match": {"BLOCK_N": 16, "BLOCK_M": 8, "num_warps": 2},
    "match_low_quality": {"BLOCK_N": 64, "BLOCK_M": 2, "num_warps": 2},
    "iou_penalty_fwd": {"BLOCK_N": 4, "BLOCK_M": 16, "num_warps": 1},
    "iou_loss_fwd": {"BLOCK": 16, "num_warps": 1},
    "iou_loss_bwd": {"BLOCK": 32, "num_warps": 2},
    "nms_mask": {"BLOCK": 32, "ROWS": 8, "num_warps": 1},
    "nms_resolve": {"WORDS": 2, "num_warps": 1},
    "nms_suppress": {"BLOCK": 64, "ROWS": 16, "SHARE": 8, "num_warps": 1},
    "nms_small": {"BLOCK": 32, "ROWS": 16, "num_warps": 1},
    "nms_segments": {"BLOCK": 64, "ROWS": 2, "CHUNK": 16, "num_warps": 1},
    "soft_nms": {"SIZE": 32, "CHUNK": 8, "num_warps": 1},
    "deform_plan": {"BLOCK": 32, "num_warps": 1},
    "deform_shift_bwd": {"BLOCK": 64, "num_warps": 2},
    "deform_sample_fwd": {"BM": 16, "LINE": 64, "num_warps": 2},
    "deform_sample_bwd": {"BM": 16, "LINE": 256, "num_warps": 2},
    "deform_gather": {"BM": 4, "LINE": 64, "num_warps": 1},
    "deform_conv_fwd": {"BM": 16, "BN": 32, "LINE": 64, "num_warps": 2, "num_stages": 3},
    "deform_conv_bwd": {"BM": 16, "BN": 16, "LINE": 64, "num_warps": 2, "num_stages": 1},
    "deform_conv_wgrad": {
        "BM": 16,
        "BN": 16,
        "LINE": 64,
        "SPLIT": 32,
        "num_warps": 2,
        "num_stages": 1,
    },
}


def test_answers_do_not_hang_on_the_settings(
    kernel: torch.device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nms, "band", lambda n: 64)
    x = torch.from_numpy(rng.normal(size=(37, 5))).float().to(kernel).requires_grad_()
    labels = torch.from_numpy(rng.integers(0, 6, 37)).to(kernel)
    corner = rng.uniform(0, 60, (150, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (150, 2))], 1)
    b = torch.from_numpy(boxes).float().to(kernel)
    scores = torch.from_numpy(rng.random(150)).float().to(kernel)

    image, weight, offset = (
        torch.from_numpy(rng.normal(size=size)).float().to(kernel).requires_grad_()
        for size in ((1, 32, 5, 5), (48, 32, 2, 2), (1, 8, 6, 6))
    )

    def answers() -> list[torch.Tensor]:
        loss = sigmoid_focal_loss(x, labels)
        (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        total = sigmoid_focal_loss(x, labels, reduction="sum")
        (slope,) = torch.autograd.grad(total, x)
        kept = [
            NMS._launch(b, scores, ids, 0.4, 0, None, None, tier)
            for tier in ("small", "segments", "bands")
            for ids in (None, labels.repeat(5)[:150])
            if ids is None or tier != "bands"
        ]
        other = b.roll(1, 0).requires_grad_()
        apart = complete_box_iou_loss(b, other)
        (pull,) = torch.autograd.grad(apart.sum(), other)
        pairs = [box_iou(b[:40], b), complete_box_iou(b[:40], b), apart, pull]
        pairs += box_match(b, b[:40] + 2)
        summed = [loss, dx, total, slope]
        for in_order in (False, True):
            torch.use_deterministic_algorithms(in_order, warn_only=True)
            out = deform_conv2d(image, offset, weight, padding=1, _implementation="fused")
            pull = torch.linspace(-1, 1, out.numel(), device=kernel).view(out.shape)
            summed += [out, *torch.autograd.grad(out, (image, offset, weight), pull)]
        pairs.append(deform_sample(image, offset, 2, padding=1))
        return [*summed, *pairs, *kept, *soft_nms(b, scores)]

    with override("nms_mask", BLOCK=64):
        want = answers()
    assert len(want[-3]) < 150
    with contextlib.ExitStack() as stack:
        used = [stack.enter_context(override(name, **values)) for name, values in OTHER.items()]
        got = answers()
    assert all(o.launches for o in used)
    for i, (a, c) in enumerate(zip(got[:12], want[:12], strict=True)):
        assert_close(a, numpy(c), scale=numpy(c.abs().max()) if i >= 4 else 0)
    for a, c in zip(got[12:], want[12:], strict=True):
        assert torch.equal(a, c)
