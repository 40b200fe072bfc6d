"""Modules over the functions, with the constructors and the state of mmdet's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks, ghm
from .reference import ghm as reference


class _GHM(nn.Module):
    """Edges and momentum's state, which stay as they are when the module's dtype changes."""

    edges: Tensor
    acc_sum: Tensor | None
    steps: Tensor | None

    def __init__(
        self,
        mu: float | None,
        bins: int,
        momentum: float,
        loss_weight: float,
        reduction: str,
        bias_correction: bool,
        process_group: dist.ProcessGroup | None,
    ):
        super().__init__()
        ghm.check_options(mu, bins, momentum, reduction, loss_weight)
        self.bins = bins
        self.momentum = momentum
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.process_group = process_group
        self.register_buffer("edges", torch.from_numpy(reference.edges(bins, mu)))
        self.acc_sum = self.steps = None
        if momentum > 0:
            del self.acc_sum
            self.register_buffer("acc_sum", torch.zeros(bins))
            if bias_correction:
                del self.steps
                self.register_buffer("steps", torch.zeros(bins, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _GHM:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return (
            f"bins={self.bins}, momentum={self.momentum}, loss_weight={self.loss_weight}, "
            f"reduction={self.reduction!r}"
        )

    def _loss(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None,
        mu: float | None,
        avg_factor: float | Tensor | None,
        reduction_override: str | None,
    ) -> Tensor:
        _checks.choice("reduction_override", reduction_override, (None, "none", "mean", "sum"))
        reduction = reduction_override or self.reduction
        return ghm.loss(
            pred, target, label_weight, mu, self.bins, self.momentum, self.acc_sum, reduction,
            self.loss_weight, avg_factor, self.steps, self.process_group, update=self.training,
        )  # fmt: skip


class GHMC(_GHM):
    """``dlops_triton.ghmc_loss`` with its state; a drop-in for mmdet's ``GHMC``.

    Args:
        bins: number of intervals.
        momentum: average the counts over calls.
        use_sigmoid: must be True.
        loss_weight: factor of the result.
        reduction: "none", "sum" or "mean".
        bias_correction: correct the average's start from zero; adds a buffer ``steps``.
        process_group: over whose ranks counts are summed.

    The buffers and the keys of ``state_dict`` are mmdet's: ``edges``, and with momentum
    ``acc_sum``. They stay fp32 in a module converted to another dtype, and change in training with
    gradients enabled only. ``edges`` are there to be saved: ``bins`` alone decides.
    """

    def __init__(
        self,
        bins: int = 10,
        momentum: float = 0,
        use_sigmoid: bool = True,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        *,
        bias_correction: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(
            None, bins, momentum, loss_weight, reduction, bias_correction, process_group
        )
        if use_sigmoid is not True:
            raise ValueError(f"use_sigmoid must be True, got {use_sigmoid!r}")
        self.use_sigmoid = use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss. Other keywords are ignored, as in mmdet, whose heads pass an ``avg_factor``
        that GHM-C does not want: it divides by the number of elements that count."""
        return self._loss(pred, target, label_weight, None, None, reduction_override)


class GHMR(_GHM):
    """``dlops_triton.ghmr_loss`` with its state; a drop-in for mmdet's ``GHMR``.

    Args:
        mu: where the loss turns from quadratic to linear.
        bins: number of intervals.
        momentum: average the counts over calls.
        loss_weight: factor of the result.
        reduction: "none", "sum" or "mean".
        bias_correction: correct the average's start from zero; adds a buffer ``steps``.
        process_group: over whose ranks counts are summed.

    The state is as that of ``GHMC``. ``avg_factor``, which mmdet ignores, replaces the divisor.
    """

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        *,
        bias_correction: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(mu, bins, momentum, loss_weight, reduction, bias_correction, process_group)
        self.mu = mu

    def extra_repr(self) -> str:
        return f"mu={self.mu}, {super().extra_repr()}"

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss."""
        return self._loss(pred, target, label_weight, self.mu, avg_factor, reduction_override)
