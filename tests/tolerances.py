"""Comparison by the one table of tolerances. Exact answers are compared exactly, elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlops_triton._check_run import RTOL, SMALLEST


def assert_close(
    got: Tensor,
    want: npt.ArrayLike,
    scale: npt.ArrayLike = 0.0,
    compute: torch.dtype | None = None,
    terms: torch.dtype | None = None,
) -> None:
    """Compare with a float64 oracle.

    ``scale``: where terms cancel, the size of the terms, whose rounding is allowed as well, in the
    dtype of the arithmetic, or in that of ``terms``, to which tensor cores want them rounded.
    ``compute``: the dtype that decides, if not that of ``got``.
    """
    dtype = compute or got.dtype
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    values: npt.NDArray[Any] = got.detach().cpu().double().numpy()
    want = np.asarray(want, np.float64)
    assert values.shape == want.shape, f"shape {values.shape}, expected {want.shape}"
    slack = SMALLEST[dtype] + RTOL[terms or arithmetic] * np.asarray(scale, np.float64)
    bad = ~(np.abs(values - want) <= slack + RTOL[dtype] * np.abs(want))
    bad &= ~(np.isnan(values) & np.isnan(want)) & (values != want)
    if bad.any():
        i = tuple(np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} values differ, first at {i}: got {values[i]!r}, "
            f"expected {want[i]!r}"
        )
