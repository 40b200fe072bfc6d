"""Deformable convolution and its sampling against the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton import _dispatch, _settings, deform_conv2d, deform_sample
from tests.deform_cases import Case, check_columns, check_convolution, draw
from tests.tools.interpreter import shuffled

IMPLEMENTATIONS = ["fused", "columns"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASES, CHUNKS = 320, 8


@contextlib.contextmanager
def large_tiles() -> Iterator[None]:
    """Fewer, larger steps where kernels are interpreted, for pace."""
    with contextlib.ExitStack() as stack:
        if _dispatch.INTERPRETED:
            for name in ("sample_fwd", "sample_bwd", "gather", "conv_fwd", "conv_bwd"):
                stack.enter_context(_settings.override(f"deform_{name}", BM=256))
            for name in ("plan", "shift_bwd"):
                stack.enter_context(_settings.override(f"deform_{name}", BLOCK=512))
        yield


def convolve(case: Case, implementation: Any = None) -> Tensor:
    options = case.convolution | {"_implementation": implementation}
    return deform_conv2d(case.x, case.offset, case.weight, **options)


def check(case: Case, implementation: str, rng: np.random.Generator, sampled: bool) -> None:
    out = convolve(case, implementation)
    assert out.is_contiguous() == case.x.is_contiguous() or 1 in out.shape[1:]
    g = torch.from_numpy(rng.normal(size=tuple(out.shape))).to(out.dtype).to(out.device)
    check_convolution(case, out, g, list(torch.autograd.grad(out, case.given, g)))
    if sampled:
        columns = deform_sample(case.x, case.offset, **case.sampling)
        g = torch.from_numpy(rng.normal(size=tuple(columns.shape))).to(out.dtype).to(out.device)
        given = [t for t in (case.x, case.offset, case.mask) if t is not None]
        check_columns(case, columns, g, list(torch.autograd.grad(columns, given, g)))


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "others"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_configurations(chunk: int, exact: bool, kernel: torch.device) -> None:
    """320 in fp64 and 320 in the other dtypes, by either implementation and either summation."""
    with large_tiles():
        for seed in range(chunk, CASES, CHUNKS):
            rng = np.random.default_rng(seed)
            dtype = torch.float64 if exact else DTYPES[int(rng.integers(3))]
            case = draw(rng, dtype).to(kernel)
            torch.use_deterministic_algorithms(seed // CHUNKS % 2 == 0, warn_only=True)
            implementation = IMPLEMENTATIONS[seed // CHUNKS // 2 % 2]
            try:
                check(case, implementation, rng, sampled=seed // CHUNKS % 4 == 0)
            except AssertionError as e:
                raise AssertionError(f"seed {seed}, {dtype}, {implementation}: {e}") from e
