"""The sum of the sigmoid focal losses of labels: one launch for the loss and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _dispatch, _losses
from ._settings import Settings
from .kernels.focal import focal_columns_kernel, focal_rows_kernel
from .reference import focal as reference

# Blocks are small, so that few hold a positive; 32 elements of a thread pay for a loop's steps.
# BLOCKS, at most 31, are a program's where there are enough to fill a GPU.
SUM = Settings(
    "focal_sum",
    fp32={"BLOCK": 1024, "BLOCKS": 8, "num_warps": 1},
    fp64={"BLOCK": 512, "BLOCKS": 8, "num_warps": 2},
)

# Enough programs for any GPU; there are more only where BLOCKS limits what one may do.
_PROGRAMS = 2048

Options = tuple[float | None, float, int]  # alpha, gamma, ignore_index


class FocalSum(_autograd.Function):
    """``apply(options, divisor, scale, with_gradient, *inputs, *labels)``, as many of each.

    The loss is the sum over all, times ``scale``, over ``divisor``, a tensor of one element.
    """

    @staticmethod
    def keep(
        ctx: Any,
        options: Options,
        divisor: Tensor | None,
        scale: float,
        with_gradient: bool,
        *tensors: Tensor,
    ) -> None:
        ctx.save_for_backward(divisor, *tensors)
        ctx.options, ctx.scale, ctx.with_loss = options, scale, with_gradient

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        divisor: Tensor | None,
        scale: float,
        with_gradient: bool,
        first: Tensor,
        *others: Tensor,
    ) -> Tensor:
        # ``first`` because torch.compile, where nothing needs a gradient, takes ctx for an argument
        # too many if without it there are as many arguments as parameters.
        tensors = first, *others
        FocalSum.keep(ctx, options, divisor, scale, with_gradient, *tensors)
        inputs, labels = _halves(tensors)
        loss, ctx.gradients = _sum(inputs, labels, divisor, scale, *options, with_gradient)
        return loss

    @staticmethod
    @_autograd.once_differentiable("sigmoid_focal_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        divisor, *tensors = ctx.saved_tensors
        inputs, labels = _halves(tensors)

        def compute(grad: Tensor | None) -> list[Tensor]:
            over = divisor
            if grad is not None:
                over = (1 if divisor is None else divisor) / grad
            gradients: list[Tensor] = _sum(inputs, labels, over, ctx.scale, *ctx.options, True)[1]
            return gradients

        gradients = _losses.gradients_of(ctx, grad, compute)
        return (None, None, None, None, *gradients, *(None for _ in labels))


def _halves(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    levels = len(tensors) // 2
    return list(tensors[:levels]), list(tensors[levels:])


def _alloc(inputs: Sequence[Tensor], with_grad: bool) -> tuple[Tensor, list[Tensor]]:
    loss = inputs[0].new_empty((), dtype=_dispatch.compute_dtype(inputs[0].dtype))
    return loss, [torch.empty_like(x) for x in inputs] if with_grad else []


def _launch(
    inputs: list[Tensor],
    labels: list[Tensor],
    divisor: Tensor | None,
    scale: float,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    loss, gradients = _alloc(inputs, with_grad)
    if loss.dtype == torch.float64 and scale != 1:
        # A number reaches a kernel in fp32.
        divisor, scale = (1 if divisor is None else divisor) / torch.full_like(loss, scale), 1.0
    losses = []
    for level, (x, t) in enumerate(zip(inputs, labels, strict=True)):
        if x.numel() == 0:
            continue
        layout = _losses.by_class(x, -1)
        settings = dict(SUM.on(x))
        block, blocks = settings["BLOCK"], min(settings.pop("BLOCKS"), 31)
        if layout.inner == 1:
            kernel, size = focal_rows_kernel, x.numel()
            total = _dispatch.cdiv(size, block)
            grid = (_dispatch.cdiv(total, _share(total, blocks)), 1)
        else:
            kernel, size = focal_columns_kernel, layout.inner
            columns, total = layout.outer * _dispatch.cdiv(size, block), layout.classes
            grid = (columns, _dispatch.cdiv(total, _share(columns * total, blocks)))
        out = loss.new_empty(1 + grid[0] * grid[1])
        _dispatch.launch(
            kernel,
            grid,
            layout.logits,
            layout.per_row(t),
            divisor,
            gradients[level] if with_grad else None,
            out,
            _dispatch.counter(x.device),
            size,
            layout.classes,
            scale,
            ALPHA=alpha,
            GAMMA=gamma,
            IGNORE_INDEX=ignore_index,
            PTX=_dispatch.inline_ptx(x.device),
            enable_fp_fusion=True,
            **settings,
        )
        losses.append(out[0])
    if not losses:
        return loss.zero_(), gradients
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), gradients


def _share(total: int, blocks: int) -> int:
    """How many blocks each program owns of a ``total``."""
    return max(min(total // _PROGRAMS, blocks), 1)


def _reference(
    inputs: list[Tensor],
    labels: list[Tensor],
    divisor: Tensor | None,
    scale: float,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    loss, gradients = _alloc(inputs, with_grad)
    factor = torch.tensor(scale, dtype=torch.float64)
    if divisor is not None:
        factor = factor / divisor.reshape(())
    total = 0.0
    for level, (x, t) in enumerate(zip(inputs, labels, strict=True)):
        args = (_dispatch.to_numpy(x), _dispatch.to_numpy(t), alpha, gamma)
        total += reference.sigmoid_focal_loss(*args, ignore_index=ignore_index).sum()
        if with_grad:
            dx = torch.from_numpy(
                reference.sigmoid_focal_loss_grad(*args, ignore_index=ignore_index)
            )
            # No gradient stays none, even where the factor is infinite.
            gradients[level].copy_(torch.where(dx == 0, dx, dx * factor))
    return loss.copy_(total * factor), gradients


_sum = _dispatch.register(
    "focal_sum(Tensor[] inputs, Tensor[] labels, Tensor? divisor, float scale, float? alpha, "
    "float gamma, int ignore_index, bool with_grad) -> (Tensor, Tensor[])",
    _launch,
    _reference,
    lambda inputs, *others: _alloc(inputs, with_grad=others[-1]),
)
