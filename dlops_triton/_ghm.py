"""GHM's second pass: losses and gradients, given the table, and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _autograd, _dispatch, _losses
from ._ghm_table import Launch, arrays
from ._settings import Settings
from .kernels.ghm import ghm_bwd_kernel, ghm_loss_kernel, ghm_loss_rows_kernel
from .reference import ghm as reference

LOSS_ROWS = Settings(
    "ghm_loss_rows",
    fp32={"BLOCK": 512, "BLOCKS": 8, "num_warps": 1},
    fp64={"BLOCK": 512, "BLOCKS": 8, "num_warps": 2},
)
LOSS = Settings(
    "ghm_loss", fp32={"BLOCK": 1024, "num_warps": 4}, fp64={"BLOCK": 512, "num_warps": 4}
)
BWD = Settings("ghm_bwd", fp32={"BLOCK": 1024, "num_warps": 4}, fp64={"BLOCK": 512, "num_warps": 4})


class Ghm(_autograd.Function):
    """The loss and its gradient, given the table; ``apply`` takes what the op takes."""

    @staticmethod
    def keep(ctx: Any, *args: Any) -> None:
        ctx.save_for_backward(*args[:5])
        ctx.options = args[5:8]
        ctx.reduce, ctx.with_loss = args[8:]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        Ghm.keep(ctx, *args)
        loss, ctx.gradients = _loss(*args)
        return loss

    @staticmethod
    @_autograd.once_differentiable("ghm_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, divisor = ctx.saved_tensors

        def compute(grad: Tensor | None) -> list[Tensor]:
            over = divisor
            if grad is not None:
                over = (1 if divisor is None else divisor) / grad
            gradients: list[Tensor] = _loss(*inputs, over, *ctx.options, True, True)[1]
            return gradients

        if ctx.reduce:
            (dx,) = _losses.gradients_of(ctx, grad, compute)
        else:
            dx = _bwd(grad, *inputs, *ctx.options)
        return dx, *(None,) * 9


def _alloc_loss(pred: Tensor, reduce: bool, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
    gradients = [torch.empty_like(pred)] if with_grad else []
    if reduce:
        return pred.new_empty((), dtype=_dispatch.compute_dtype(pred.dtype)), gradients
    return torch.empty_like(pred), gradients


def _launch_loss(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    table: Tensor,
    divisor: Tensor | None,
    scale: float,
    mu: float | None,
    bins: int,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    loss, gradients = _alloc_loss(pred, reduce, with_grad)
    if pred.numel() == 0:
        return loss.zero_(), gradients
    if table.dtype == torch.float64 and scale != 1:
        # A number reaches a kernel in fp32.
        divisor = (1 if divisor is None else divisor) / torch.full_like(table[-1], scale)
        scale = 1.0
    launch = Launch(pred, target, label_weight, mu, bins, LOSS, LOSS_ROWS if reduce else None)
    out = loss.new_empty(1 + launch.programs) if reduce else loss
    constants: dict[str, Any] = {"BINS": bins} if launch.rows else {"REDUCE": reduce}
    launch(
        ghm_loss_rows_kernel if launch.rows else ghm_loss_kernel,
        table,
        divisor,
        gradients[0] if with_grad else None,
        out,
        _dispatch.counter(pred.device),
        *launch.sizes,
        scale,
        enable_fp_fusion=True,
        **constants,
    )
    return (out[0] if reduce else loss), gradients


def _launch_bwd(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    table: Tensor,
    scale: float,
    mu: float | None,
    bins: int,
) -> Tensor:
    dx = torch.empty_like(pred)
    if pred.numel() == 0:
        return dx
    divisor = None
    if table.dtype == torch.float64 and scale != 1:
        divisor, scale = 1 / torch.full_like(table[-1], scale), 1.0
    launch = Launch(pred, target, label_weight, mu, bins, BWD, None)
    # A gradient that is one number expanded is read in place.
    scalar = not any(grad.stride())
    launch(
        ghm_bwd_kernel,
        table,
        grad if scalar else launch.layout.per_element(grad),
        dx,
        *launch.sizes,
        divisor,
        scale,
        SCALAR_GRAD=scalar,
        enable_fp_fusion=True,
    )
    return dx


def _reference_terms(
    pred: Tensor, target: Tensor, label_weight: Tensor | None, table: Tensor, mu: float | None,
    bins: int,
) -> tuple[Any, Any]:  # fmt: skip
    weights = _dispatch.to_numpy(table)[:bins].astype(np.float64)
    x, t, weight = arrays(pred, target, label_weight)
    return reference.elementwise(x, t, weight, weights, mu)


def _reference_loss(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    table: Tensor,
    divisor: Tensor | None,
    scale: float,
    mu: float | None,
    bins: int,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    loss, gradients = _alloc_loss(pred, reduce, with_grad)
    losses, slopes = _reference_terms(pred, target, label_weight, table, mu, bins)
    factor = torch.tensor(scale, dtype=torch.float64)
    if divisor is not None:
        factor = factor / divisor.reshape(())
    loss.copy_(torch.as_tensor(losses.sum() if reduce else losses) * factor)
    for gradient in gradients:
        dx = torch.from_numpy(slopes)
        # No gradient stays none, even where the factor is infinite.
        gradient.copy_(torch.where(dx == 0, dx, dx * factor))
    return loss, gradients


def _reference_bwd(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    table: Tensor,
    scale: float,
    mu: float | None,
    bins: int,
) -> Tensor:
    dx = torch.from_numpy(_reference_terms(pred, target, label_weight, table, mu, bins)[1])
    return torch.empty_like(pred).copy_(torch.where(dx == 0, dx, dx * scale * grad))


_loss = _dispatch.register(
    "ghm_loss(Tensor pred, Tensor target, Tensor? label_weight, Tensor table, Tensor? divisor, "
    "float scale, float? mu, int bins, bool reduce, bool with_grad) -> (Tensor, Tensor[])",
    _launch_loss,
    _reference_loss,
    lambda pred, *others: _alloc_loss(pred, *others[-2:]),
)
_bwd = _dispatch.register(
    "ghm_bwd(Tensor grad, Tensor pred, Tensor target, Tensor? label_weight, Tensor table, "
    "float scale, float? mu, int bins) -> Tensor",
    _launch_bwd,
    _reference_bwd,
    lambda grad, pred, *_: torch.empty_like(pred),
)
