"""GHM's bins are exactly those of the reference, in both passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlops_triton import _dispatch, _ghm, _ghm_table, _settings
from dlops_triton.reference import ghm as reference
from tests.arrays import numpy

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def large_blocks() -> Iterator[None]:
    """The interpreter's time goes by programs."""
    with contextlib.ExitStack() as stack:
        if _dispatch.INTERPRETED:
            for name in ("count", "count_rows", "loss_rows", "bwd"):
                stack.enter_context(_settings.override(f"ghm_{name}", BLOCK=8192))
        yield


def members(x: Tensor, target: Tensor, mu: float | None, bins: int, reduce: bool) -> Any:
    """The bin of each element that the second pass looks up, 0 if the gradient is tiny."""
    table = _ghm_table.table_of(x, target, None, mu, bins)
    table[:bins] = torch.arange(1, bins + 1, device=x.device)
    table[bins] = bins
    options = (x, target, None, table)
    if reduce:
        dx = _ghm._loss(*options, None, 1.0, mu, bins, True, True)[1][0]
    else:
        dx = _ghm._bwd(torch.ones_like(x), *options, 1.0, mu, bins)
    pred, t = x.float().cpu().numpy(), target.float().cpu().numpy()
    g = reference.norm(pred, reference.dense_targets(pred, t), mu)
    seen = g > 1e-4
    return np.where(seen, (np.abs(numpy(dx)) / np.where(seen, g, 1)).round() - 1, 0)


def check_members(x: Tensor, target: Tensor, mu: float | None, bins: int, reduce: bool) -> None:
    dense = (target.float() if target.dim() == x.dim() else target).cpu().numpy()
    want = reference.membership(x.float().cpu().numpy(), dense, None, mu, bins)
    totals = _ghm_table.totals_of(x, target, None, mu, bins)
    assert totals[:bins].tolist() == np.bincount(want[want >= 0], minlength=bins).tolist()
    assert totals[bins] == x.numel()
    got = members(x, target, mu, bins, reduce)
    assert np.array_equal(got[want >= 0], want[want >= 0])


def all_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def around(thresholds: tuple[float, ...]) -> Tensor:
    """Each fp32 number within 50 ulps of one of these, and the ends."""
    at = np.array(thresholds, np.float32)
    near = [at]
    for way in (-np.inf, np.inf):
        step = at
        for _ in range(50):
            step = np.nextafter(step, np.float32(way))
            near.append(step)
    ends = np.array([0, -0.0, 1e4, -1e4, np.inf, 3e38, 1e-45], np.float32)
    return torch.from_numpy(np.concatenate([*near, ends]))


@pytest.mark.parametrize("bins", [10, 30])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT, HALF, FLOAT], ids=str)
@pytest.mark.parametrize("form", ["labels", "dense"])
def test_bins_of_ghmc_are_exact(
    bins: int, positive: bool, dtype: torch.dtype, form: str, kernel: torch.device
) -> None:
    if dtype == FLOAT:
        x = around(reference.thresholds(bins, None, False)) * (-1 if positive else 1)
    else:
        x = all_of(dtype)
    x = x.to(kernel)
    if form == "dense":
        check_members(x, torch.full(x.shape, float(positive), device=kernel), None, bins, False)
        return
    # Positives have one class, negatives many; half of them, of which the interpreter takes long.
    x = x[bins == 10 :: 2, None] if positive else x[: x.numel() // 8 * 8].reshape(-1, 8)
    t = torch.full((len(x),), 0 if positive else -1, device=kernel)
    check_members(x, t, None, bins, True)


@pytest.mark.parametrize("bins", [10, 30])
@pytest.mark.parametrize("mu", [0.02, 1.0])
def test_bins_of_ghmr_are_exact(bins: int, mu: float, kernel: torch.device) -> None:
    x = around(reference.thresholds(bins, mu, False)).to(kernel)
    for pred, target in (
        (x, torch.zeros_like(x)),
        (-x, torch.zeros_like(x)),
        (x + 0.3, torch.full_like(x, 0.3)),
    ):
        check_members(pred, target, mu, bins, False)
    for dtype in (BFLOAT, HALF):
        x = all_of(dtype).to(kernel)
        check_members(x, torch.full_like(x, 0.25), mu, bins, False)


def test_bins_of_fp64_are_exact(kernel: torch.device) -> None:
    at = np.array(reference.thresholds(10, None, True))
    x = torch.from_numpy(np.concatenate([at, np.nextafter(at, -np.inf)])).to(kernel)
    for sign, t in ((1, 0.0), (-1, 1.0)):
        args = (x * sign, torch.full_like(x, t), None, None, 10)
        want = np.bincount(
            reference.membership(numpy(args[0]), numpy(args[1]), None, None, 10), minlength=10
        )
        assert want.max() == 2
        assert _ghm_table.totals_of(*args)[:10].tolist() == want.tolist()


def test_a_block_of_nothing_but_a_threshold(kernel: torch.device) -> None:
    """Its largest key reaches that threshold, and no higher one."""
    for k, threshold in enumerate(reference.thresholds(10, None, False)):
        x = torch.full((4, 8), threshold, device=kernel)
        t = torch.full((4,), -1, device=kernel)
        totals = _ghm_table.totals_of(x, t, None, None, 10)
        assert totals[:10].tolist() == [32 * (i == k + 1) for i in range(10)]
