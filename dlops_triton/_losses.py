"""What the fused losses share on the host: gradients computed with the loss, and memory layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch
from ._settings import Settings
from .kernels._loss import scale_kernel

SCALE = Settings("scale", fp32={"BLOCK": 4096, "num_warps": 4})
# Most programs of a scaling launch: enough to fill any GPU, few enough to end at once.
_PROGRAMS = 1024


def gradient_with_loss(dtype: torch.dtype) -> bool:
    """Whether the forward launch of a reduced loss should compute its gradient as well.

    It saves reading the input again, unless backward has to scale the gradient out of place, as
    the functional graph of torch.compile would; and in fp16 a gradient divided by ``avg_factor``
    underflows before a GradScaler's factor could save it. There backward computes it, and under
    torch.func, whose backward passes are functions of what forward was given.
    """
    return (
        dtype != torch.float16
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def gradients_of(
    ctx: Any, grad: Tensor, compute: Callable[[Tensor | None], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """The gradients times ``grad``, a tensor of one element, for a backward pass to return.

    ``ctx.with_loss``: they came with the loss, and ``ctx.gradients`` holds them. They are given
    away the first time, since nothing else refers to them, and scaled in place. A second backward
    pass finds none left, and ``compute(None)`` computes them again. ``compute(grad)`` computes them
    scaled, also where ``grad`` is a batch of gradients that vmap hides.
    """
    if not ctx.with_loss or torch._C._are_functorch_transforms_active():
        return compute(grad)
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = compute(None)
    for gradient in gradients:
        _scale_(gradient, grad)
    return gradients


def _launch_scale(dx: Tensor, grad: Tensor) -> None:
    if dx.numel() == 0:
        return
    settings = SCALE.on(dx)
    programs = min(_dispatch.cdiv(dx.numel(), settings["BLOCK"]), _PROGRAMS)
    _dispatch.launch(
        scale_kernel, (programs,), dx, grad, dx.numel(), enable_fp_fusion=True, **settings
    )


def _reference_scale(dx: Tensor, grad: Tensor) -> None:
    dx.copy_(torch.where(dx == 0, dx, dx * grad))


_scale_ = _dispatch.register(
    "loss_scale_(Tensor(a!) dx, Tensor grad) -> ()",
    _launch_scale,
    _reference_scale,
    lambda dx, grad: None,
)


class ByClass(NamedTuple):
    """Logits as memory holds them, [outer, classes, inner], which no copy was needed for.

    A class dimension that is last in memory leaves ``inner`` 1; that of an [N, C, H, W] head,
    however it was permuted since, leaves ``inner`` H * W.
    """

    logits: Tensor  # with the strides of an empty_like of the input
    rows: tuple[int, ...]  # the dimensions without that of the class, in the order of memory
    outer: int
    classes: int
    inner: int

    def per_row(self, t: Tensor) -> Tensor:
        """Labels or weights, which have no class dimension, as contiguous [outer, inner]."""
        return t.permute(self.rows).contiguous()

    def per_element(self, t: Tensor) -> Tensor:
        """A tensor of the logits' shape, with the logits' strides."""
        if t.stride() == self.logits.stride():
            return t
        return torch.empty_like(self.logits, dtype=t.dtype).copy_(t)


def by_class(logits: Tensor, dim: int) -> ByClass:
    """The layout of ``logits``, of which dimension ``dim`` is the classes'.

    Copied only if the memory has gaps or overlaps, as that of a slice or an expanded tensor.
    """
    shape, dim = logits.shape, dim % max(logits.dim(), 1)
    if dim == logits.dim() - 1 and logits.is_contiguous():  # most are
        classes = shape[dim]
        return ByClass(logits, tuple(range(dim)), math.prod(shape[:dim]), classes, 1)
    order = _order(logits)
    if not logits.permute(order).is_contiguous():
        logits = torch.empty_like(logits).copy_(logits)
        order = _order(logits)
    at = order.index(dim) if order else 0
    return ByClass(
        logits,
        tuple(d - (d > dim) for d in order if d != dim),
        math.prod(shape[d] for d in order[:at]),
        shape[dim] if order else 1,
        math.prod(shape[d] for d in order[at + 1 :]),
    )


def _order(t: Tensor) -> list[int]:
    """The dimensions of ``t`` from the slowest in memory to the fastest."""
    strides = t.stride()
    return sorted(range(t.dim()), key=lambda d: -strides[d])
