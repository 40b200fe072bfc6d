"""The deformable convolution's numpy oracle, pinned from outside."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dlops_triton.reference import deform as reference
from dlops_triton.reference.deform import Geometry
from tests import peers
from tests.arrays import numpy

Array = NDArray[Any]
GRADS = ("x", "offset", "mask", "weight", "bias")


def at(y: float, x: float, image: Array) -> float:
    """A sample of [H, W] by a kernel of one tap, whose offset is all of the position."""
    offset = np.array([y, x]).reshape(1, 2, 1, 1)
    geometry = Geometry((1, 1), stride=(99, 99))
    return float(reference.sample(image[None, None], offset, None, geometry)[0, 0, 0])


def test_hand_values() -> None:
    image = np.array([[1.0, 2], [10, 20], [100, 200]])
    assert at(0, 0, image) == 1
    assert at(2, 1, image) == 200
    assert at(0.5, 0.5, image) == (1 + 2 + 10 + 20) / 4
    assert at(1.25, 0, image) == 0.75 * 10 + 0.25 * 100
    assert at(0, 0.25, image) == 1.25
    # Over the border corners count as 0, up to a distance of 1.
    assert at(-0.25, 0, image) == 0.75
    assert at(2.5, 1, image) == 100
    assert at(2.5, 1.5, image) == 50
    assert at(-0.5, -0.5, image) == 0.25
    for y, x in [(-1, 0), (3, 0), (0, -1), (0, 2), (-7, 0), (1e30, 0), (0, -np.inf)]:
        assert at(y, x, image) == 0
    assert np.isnan(at(np.nan, 0, image))
    assert np.isnan(at(0, np.nan, image))
    assert at(np.nan, 5, image) == 0  # outside, wherever the other coordinate is


def test_layout() -> None:
    """(y, x) for each tap, taps in reading order, offset groups outermost; channels before taps."""
    x = np.arange(2 * 4 * 5.0).reshape(1, 2, 4, 5)
    offset = np.zeros((2, 2, 3, 2, 2))  # group, ky, kx, (y, x), output
    offset[1, 0, 2, 0] = 1
    offset[0, 1, 1, 1] = -1
    mask = np.ones((2, 2, 3, 2))
    mask[1, 1, 2] = 3
    geometry = Geometry((2, 3), stride=(3, 2), dilation=(2, 1))
    columns = reference.sample(x, offset.reshape(1, 24, 1, 2), mask.reshape(1, 12, 1, 2), geometry)
    columns = columns.reshape(2, 2, 3, 2)
    for c, i, j, output in itertools.product(range(2), range(2), range(3), range(2)):
        row, column = 2 * i, 2 * output + j
        row += (c, i, j) == (1, 0, 2)
        column -= (c, i, j) == (0, 1, 1)
        factor = 3 if (c, i, j) == (1, 1, 2) else 1
        assert columns[c, i, j, output] == factor * x[0, c, row, column]


@pytest.mark.parametrize(("case", "arrays"), peers.cases("deform_conv"))
def test_agrees_with_the_peers(case: Any, arrays: dict[str, Array]) -> None:
    x, offset, mask, weight = (arrays.get(name) for name in GRADS[:4])
    assert x is not None
    assert offset is not None
    assert weight is not None
    pairs = (case["args"][name] for name in ("stride", "padding", "dilation"))
    geometry = Geometry((weight.shape[2], weight.shape[3]), *pairs)
    out = reference.conv2d(x, offset, mask, weight, arrays.get("bias"), geometry)
    np.testing.assert_allclose(out, arrays["out"], rtol=1e-12, atol=1e-13)
    got = reference.conv2d_grad(x, offset, mask, weight, geometry, arrays["grad_out"])
    for name, d in zip(GRADS, got, strict=True):
        if f"grad_{name}" in arrays:
            np.testing.assert_allclose(d, arrays[f"grad_{name}"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_a_convolution(
    stride: tuple[int, int], groups: int, rng: np.random.Generator
) -> None:
    x, weight = torch.from_numpy(rng.normal(size=(2, 4, 9, 8))), torch.randn(6, 4 // groups, 3, 2)
    geometry = Geometry((3, 2), stride, (1, 2), (2, 1))
    want = F.conv2d(x, weight.double(), None, *geometry[1:], groups)
    offset = np.zeros((2, 12, *want.shape[2:]))
    got = reference.conv2d(numpy(x), offset, None, numpy(weight), None, geometry)
    np.testing.assert_allclose(got, numpy(want), rtol=1e-12, atol=1e-13)
    columns = reference.sample(numpy(x), offset, None, geometry)
    order = ((3, 2), (2, 1), (1, 2), stride)
    assert np.array_equal(columns, numpy(F.unfold(x, *order)))


def textbook(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
    """The columns by torch operations that torch differentiates: a sum over all pixels of

    max(0, 1 - |y - pixel's y|) max(0, 1 - |x - pixel's x|), as in the paper (eq. 3 and 4).
    """
    (kh, kw), stride, padding, dilation = geometry
    b, c, height, width = x.shape
    out_h, out_w = offset.shape[2:]
    off = offset.reshape(b, -1, kh, kw, 2, out_h, out_w)
    steps = torch.arange(kh)[:, None, None, None], torch.arange(out_h)[:, None]
    y = off[:, :, :, :, 0] + steps[0] * dilation[0] - padding[0] + steps[1] * stride[0]
    steps = torch.arange(kw)[:, None, None], torch.arange(out_w)
    x_at = off[:, :, :, :, 1] + steps[0] * dilation[1] - padding[1] + steps[1] * stride[1]
    by_y = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)
    by_x = (1 - (x_at[..., None] - torch.arange(width)).abs()).clamp(min=0)
    groups = off.shape[1]
    split = x.reshape(b, groups, c // groups, height, width)
    values = torch.einsum("bgijuvh,bgijuvw,bgchw->bgcijuv", by_y, by_x, split)
    values = values * mask.reshape(b, groups, 1, kh, kw, out_h, out_w)
    return values.reshape(b, c * kh * kw, out_h * out_w)


def test_is_the_papers_formula_and_its_gradient_torchs(rng: np.random.Generator) -> None:
    geometry = Geometry((3, 2), (2, 1), (1, 1), (1, 2))
    x = torch.from_numpy(rng.normal(size=(2, 4, 7, 6))).requires_grad_()
    offset = torch.from_numpy(rng.normal(size=(2, 24, 4, 6)) * 2).requires_grad_()
    mask = torch.from_numpy(rng.random((2, 12, 4, 6))).requires_grad_()
    weight = torch.from_numpy(rng.normal(size=(6, 2, 3, 2))).requires_grad_()
    columns = textbook(x, offset, mask, geometry)
    arrays = numpy(x), numpy(offset), numpy(mask)
    got = reference.sample(*arrays, geometry)
    np.testing.assert_allclose(got, numpy(columns), rtol=1e-12, atol=1e-13)
    g = torch.from_numpy(rng.normal(size=tuple(columns.shape)))
    want = torch.autograd.grad(columns, (x, offset, mask), g, retain_graph=True)
    found = reference.sample_grad(*arrays, geometry, numpy(g))
    for d, w in zip(found, want, strict=True):
        np.testing.assert_allclose(d, numpy(w), rtol=1e-11, atol=1e-12)

    out = torch.einsum(
        "gok,bgkl->bgol", weight.reshape(2, 3, -1), columns.reshape(2, 2, 12, -1)
    ).reshape(2, 6, 4, 6)
    g = torch.from_numpy(rng.normal(size=(2, 6, 4, 6)))
    both = torch.autograd.grad(out, (x, offset, mask, weight), g)
    by_all = reference.conv2d_grad(*arrays, numpy(weight), geometry, numpy(g))
    for d, w in zip(by_all[:4], both, strict=True):
        np.testing.assert_allclose(d, numpy(w), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(by_all[4], numpy(g).sum((0, 2, 3)), rtol=1e-12)


def test_gradient_at_integers_and_outside() -> None:
    """At integers that of the cell below and to the right; outside, from exactly -1 on, none."""
    image = np.array([[1.0, 2], [10, 20], [100, 200]])[None, None]
    geometry = Geometry((1, 1), stride=(99, 99))
    ones = np.ones((1, 1, 1))

    def slopes(y: float, x: float) -> list[float]:
        offset = np.array([y, x]).reshape(1, 2, 1, 1)
        return list(reference.sample_grad(image, offset, None, geometry, ones)[1].ravel())

    assert slopes(0, 0) == [9, 1]
    assert slopes(1, 1) == [180, -20]
    assert slopes(2, 1) == [-200, -200]
    assert slopes(-0.5, 0) == [1, 0.5]
    for y, x in [(-1, 0), (3, 0), (0, -1), (0, 2), (1e30, 0)]:
        assert slopes(y, x) == [0, 0]
    assert np.isnan(slopes(np.nan, 0)).all()
    assert slopes(np.nan, 5) == [0, 0]
