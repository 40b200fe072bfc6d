"""Deformable convolutions drawn at random, and their answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlops_triton import _dispatch, _settings
from dlops_triton.reference import deform as reference
from dlops_triton.reference.deform import Geometry
from tests.arrays import numpy
from tests.tolerances import assert_close

Array = NDArray[Any]

# Few of each: a number of taps compiles its own kernels.
KERNELS = [(3, 2), (1, 2), (2, 1), (1, 1), (3, 2), (1, 2), (2, 1), (3, 3)]


@dataclass
class Case:
    x: Tensor
    offset: Tensor
    mask: Tensor | None
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    @property
    def given(self) -> list[Tensor]:
        """What may require a gradient, in the order of the reference's gradients."""
        every = (self.x, self.offset, self.mask, self.weight, self.bias)
        return [t for t in every if t is not None]

    @property
    def sampling(self) -> dict[str, Any]:
        return self.geometry._asdict() | {"mask": self.mask}

    @property
    def convolution(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation")
        return {name: getattr(self.geometry, name) for name in names} | {
            "bias": self.bias,
            "mask": self.mask,
        }

    def to(self, device: torch.device) -> Case:
        moved = [
            None if t is None else t.to(device).requires_grad_()
            for t in (self.x, self.offset, self.mask, self.weight, self.bias)
        ]
        return Case(*moved, self.geometry)  # type: ignore[arg-type]

    def arrays(self) -> list[Any]:
        every = (self.x, self.offset, self.mask, self.weight, self.bias)
        return [None if t is None else numpy(t) for t in every]


def draw(rng: np.random.Generator, dtype: torch.dtype) -> Case:
    """Any geometry, groups and strides; samples within, at integers, at the border and far out."""

    def pick(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    kernel = KERNELS[rng.integers(len(KERNELS))]
    while True:
        stride, padding, dilation = (
            pick((1, 1), (2, 1), (1, 3)),
            pick((1, 1), (0, 2), (2, 0), (0, 0)),
            pick((1, 1), (2, 1), (1, 2)),
        )
        size = rng.integers(1, 9, 2)
        out = [
            (s + 2 * p - d * (k - 1) - 1) // step + 1
            for s, k, step, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        ]
        if min(out) > 0:
            break
    offset_groups, groups, images = pick(1, 2, 4), pick(1, 2, 4), pick(1, 2, 3)
    channels, outputs = 4 * pick(1, 2, 5), 4 * pick(1, 3)
    taps = kernel[0] * kernel[1]
    offset = rng.normal(size=(images, 2 * offset_groups * taps, *out)) * pick(0.1, 1, 4)
    offset[rng.random(offset.shape) < 0.2] = pick(0, 1, -1, 2)
    offset = np.where(rng.random(offset.shape) < 0.3, np.round(offset * 4) / 4, offset)
    offset = np.round(offset * 2**30) / 2**30  # positions are exact, in the oracle as well
    if pick(0, 1):
        offset[rng.random(offset.shape) < 0.1] = pick(1e4, -1e4, 6e4)

    def tensor(a: Array) -> Tensor:
        return torch.from_numpy(np.asarray(a)).to(dtype)

    x = tensor(rng.normal(size=(images, channels, *size)))
    if pick(0, 1):
        x = x.contiguous(memory_format=torch.channels_last)
    return Case(
        x,
        tensor(offset),
        tensor(rng.normal(size=(images, offset_groups * taps, *out))) if pick(0, 1) else None,
        tensor(rng.normal(size=(outputs, channels // groups, *kernel))),
        tensor(rng.normal(size=outputs)) if pick(0, 1) else None,
        Geometry(kernel, stride, padding, dilation),
    )


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


def check_columns(case: Case, columns: Tensor, grad: Tensor, grads: list[Tensor]) -> None:
    """Compare `deform_sample` and its gradients with the oracle."""
    x, offset, mask, _, _ = case.arrays()
    size = [None if a is None else np.abs(a) for a in (x, mask)]
    scale = reference.sample(size[0], offset, size[1], case.geometry)
    assert_close(columns, reference.sample(x, offset, mask, case.geometry), scale)
    _check_data(case, grads, numpy(grad), np.abs(numpy(grad)), None)


def check_convolution(case: Case, out: Tensor, grad: Tensor, grads: list[Tensor]) -> None:
    """Compare `deform_conv2d` and its gradients with the oracle."""
    x, offset, mask, weight, bias = case.arrays()
    terms = None if out.dtype in (torch.float32, torch.float64) else out.dtype
    size = [None if a is None else np.abs(a) for a in (x, mask, weight, bias)]
    scale = reference.conv2d(size[0], offset, size[1], size[2], size[3], case.geometry)
    want = reference.conv2d(x, offset, mask, weight, bias, case.geometry)
    assert_close(out, want, scale, terms=terms)

    g = numpy(grad)
    by_column = _gradient_by_columns(weight, g, x.shape[1])
    bound = _gradient_by_columns(size[2], np.abs(g), x.shape[1])
    data = [d for d, t in zip(grads, case.given, strict=True) if t is not case.weight]
    if case.bias is not None:
        assert_close(data.pop(), g.sum((0, 2, 3)), np.abs(g).sum((0, 2, 3)))
    _check_data(case, data, by_column, bound, terms)
    (d_weight,) = (d for d, t in zip(grads, case.given, strict=True) if t is case.weight)
    wanted = reference.conv2d_grad(x, offset, mask, weight, case.geometry, g)[3]
    scale = reference.conv2d_grad(size[0], offset, size[1], size[2], case.geometry, np.abs(g))[3]
    assert_close(d_weight, wanted, scale, terms=terms)


def _gradient_by_columns(weight: Array, grad: Array, channels: int) -> Array:
    """[B, C * K, L] from [B, Co, Ho, Wo]."""
    groups = channels // weight.shape[1]
    w = weight.reshape(groups, len(weight) // groups, -1)
    g = grad.reshape(len(grad), groups, w.shape[1], -1)
    return (w.swapaxes(1, 2) @ g).reshape(len(grad), -1, g.shape[3])


def _check_data(
    case: Case, grads: list[Tensor], by_column: Array, bound: Array, terms: torch.dtype | None
) -> None:
    """Compare gradients by image, offset and mask; ``bound``: the size of that by columns."""
    x, offset, mask, _, _ = case.arrays()
    want = reference.sample_grad(x, offset, mask, case.geometry, by_column)
    size = [None if a is None else np.abs(a) for a in (x, mask)]
    d_x, _, d_mask = reference.sample_grad(size[0], offset, size[1], case.geometry, bound)
    # Of a slope's terms, differences between pixels, none is above twice the largest pixel.
    groups = offset.shape[1] // (2 * by_column.shape[1] // x.shape[1])
    b, taps = len(x), by_column.shape[1] // x.shape[1]
    by_tap = bound.reshape(b, groups, -1, taps, bound.shape[2]).sum(2)
    slopes = 2 * np.abs(x).max() * by_tap.reshape(b, groups * taps, *offset.shape[2:])
    slopes = slopes * (1 if mask is None else np.abs(mask))
    scales = [d_x, np.repeat(slopes, 2, axis=1), d_mask]
    for got, w, scale in zip(grads, want, scales, strict=False):
        assert_close(got, w, scale, terms=terms)
