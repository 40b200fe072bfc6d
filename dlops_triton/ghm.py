"""GHM-C and GHM-R: the public functions, their autograd and their launchers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, _losses
from ._ghm import Ghm
from ._ghm_table import (
    averaged_table_from,
    averaged_table_of,
    table_from,
    table_of,
    totals_of,
)

_MOST_BINS = 128  # each is a constant of the kernel

Reduction = Literal["none", "mean", "sum"]


def ghmc_loss(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    bins: int = 10,
    momentum: float = 0.0,
    acc_sum: Tensor | None = None,
    reduction: Reduction = "mean",
    loss_weight: float = 1.0,
    avg_factor: float | Tensor | None = None,
    bias_correction: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Binary cross-entropy in which examples of equally large gradient share one weight.

    GHM-C of Li et al., "Gradient Harmonized Single-stage Detector", AAAI 2019, as mmdet computes
    it. The norm of the gradient :math:`g = |\sigma(x) - t|` is put into one of ``bins`` equal
    intervals of [0, 1]; an element weighs ``total / (elements of its bin * bins not empty)``.

    Args:
        pred: logits [..., C], fp16, bf16, fp32 or fp64, any strides. Or a DTensor sharded by rows
            over a mesh of one dimension, and so ``target`` and ``label_weight``: that is
            ``process_group``, with a loss that is sharded alike or a partial sum.
        target: as many dimensions as ``pred``: the same shape, floating point, bool or integer, in
            [0, 1]. One dimension fewer: integer labels, where a label in [0, C) is the positive
            class and any other (C, -1, ...) is background.
        label_weight: elements count where it is above 0; how far above is of no account. Of the
            shape of ``pred``, or of that without its last dimension. NaN does not count.
        bins: number of intervals, in [1, 128]. Each number compiles its own kernel.
        momentum: in [0, 1). Above 0 the counts are averaged over calls in ``acc_sum``.
        acc_sum: [bins], fp32 or fp64, contiguous; zeros at first. Updated in place for the bins
            that are not empty, ``acc_sum * momentum + count * (1 - momentum)``, unless in
            ``torch.no_grad``; the weights are those of the updated value in any case.
        reduction: "none": weight * loss * ``loss_weight``, which is not divided. "sum" of these.
            "mean": the sum over ``total``, the elements that count, at least 1.
        loss_weight: factor of the result.
        avg_factor: divisor of "mean" instead of ``total``, a positive number or a tensor of one
            element, which is not read on the host.
        bias_correction: [bins] int64, zeros at first: how often each bin was updated, counted in
            place as ``acc_sum`` is. An average that began at 0 is divided by what is missing,
            ``1 - momentum ** updates``. None: as in mmdet, whose first losses are
            ``1 / (1 - momentum)`` times too large.
        process_group: counts and ``total`` are summed over its ranks, by a functional collective,
            which all of them must reach. Losses and gradients are then each rank's share of those
            of the joined batch: the ranks' losses sum to it. DistributedDataParallel averages
            gradients, so give it ``loss_weight`` times the number of ranks.

    Returns:
        "none": [..., C] in the dtype of ``pred``. "sum" and "mean": a scalar, fp32 (fp64 for fp64
        ``pred``), 0 for empty ``pred``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, named
            in the message with its value; ``momentum`` without ``acc_sum``; ``avg_factor`` without
            "mean"; ``target``, ``label_weight`` or ``avg_factor`` that require a gradient.

    The weights are constants of the gradient. The arithmetic is fp32 (fp64 for fp64). Edges are
    fp32 numbers. For targets of 0 and 1 the bin is exactly that of the sigmoid in double
    precision; for others g is rounded to fp32 first, and may fall beside an edge. A NaN logit is
    in no bin and makes the loss NaN, but not where it does not count. Bitwise deterministic.
    Nothing is synchronised with the host. Two launches, of which the second computes the gradient
    too; backward multiplies it in place, or moves nothing where the incoming one is 1. Under
    ``process_group`` one launch more. Differentiating twice raises.
    """
    return loss(
        pred, target, label_weight, None, bins, momentum, acc_sum, reduction, loss_weight,
        avg_factor, bias_correction, process_group,
    )  # fmt: skip


def ghmr_loss(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    mu: float = 0.02,
    bins: int = 10,
    momentum: float = 0.0,
    acc_sum: Tensor | None = None,
    reduction: Reduction = "mean",
    loss_weight: float = 1.0,
    avg_factor: float | Tensor | None = None,
    bias_correction: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth L1 loss in which examples of equally large gradient share one weight.

    GHM-R of Li et al., AAAI 2019, as mmdet computes it: the loss :math:`\sqrt{d^2 + \mu^2} - \mu`
    of :math:`d` = pred - target, with :math:`g = |d| / \sqrt{d^2 + \mu^2}`.

    Args:
        pred: [...], fp16, bf16, fp32 or fp64, any strides.
        target: floating point, of the shape of ``pred``.
        label_weight: as for ``ghmc_loss``, but ``total`` is its sum, at least 1.
        mu: where the loss turns from quadratic to linear, in [1e-30, 1e30].
        bins: as for ``ghmc_loss``, and so are the others.
        momentum: average of the counts.
        acc_sum: [bins], updated in place.
        reduction: "none", "sum" or "mean".
        loss_weight: factor of the result.
        avg_factor: divisor of "mean".
        bias_correction: [bins] int64, updated in place.
        process_group: whose ranks' counts are summed.

    Returns:
        As ``ghmc_loss``.

    Raises:
        TypeError, ValueError: as ``ghmc_loss``.

    d is rounded once, to fp32 (fp64 for fp64 ``pred``), and its bin is exact. The gradient is that
    by ``pred``; ``target`` gets none. Otherwise as ``ghmc_loss``.
    """
    return loss(
        pred, target, label_weight, mu, bins, momentum, acc_sum, reduction, loss_weight,
        avg_factor, bias_correction, process_group,
    )  # fmt: skip


def loss(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    mu: float | None,
    bins: int,
    momentum: float,
    acc_sum: Tensor | None,
    reduction: str,
    loss_weight: float,
    avg_factor: float | Tensor | None,
    steps: Tensor | None,
    process_group: dist.ProcessGroup | None,
    update: bool = True,
) -> Tensor:
    """GHM-R with ``mu``, else GHM-C. Without ``update`` no state changes."""
    if _checks.distributed(pred):
        from . import _distributed

        rows = _distributed.Rows("pred", pred, -1)
        if len(rows.placements) != 1:
            raise ValueError(f"pred must have a mesh of one dimension, got {rows.mesh}")
        if rows.placements[0].is_shard():
            process_group = rows.mesh.get_group()
        part = loss(
            rows.local("pred", pred), rows.local("target", target),
            rows.local("label_weight", label_weight), mu, bins, momentum, acc_sum, reduction,
            loss_weight, _distributed.whole(avg_factor), steps, process_group, update,
        )  # fmt: skip
        return rows.loss(part, pred.shape if reduction == "none" else None)
    _check(pred, target, label_weight, mu)
    check_options(mu, bins, momentum, reduction, loss_weight)
    _check_state(pred, bins, momentum, acc_sum, steps)
    _check_avg_factor(avg_factor, pred, reduction)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )
    if momentum == 0:
        acc_sum = steps = None
    update = update and acc_sum is not None and torch.is_grad_enabled()
    kind = (None if mu is None else float(mu), int(bins))
    averaging = (acc_sum, steps, *kind, float(momentum), update)
    inputs = (pred.detach(), target, label_weight)
    if process_group is None:
        if acc_sum is not None:
            table = averaged_table_of(*inputs, *averaging)
        else:
            table = table_of(*inputs, *kind)
    else:
        from torch.distributed import _functional_collectives as collectives

        totals = totals_of(*inputs, *kind)
        totals = collectives.wait_tensor(collectives.all_reduce(totals, "sum", process_group))
        double = pred.dtype == torch.float64
        if acc_sum is not None:
            table = averaged_table_from(totals, *averaging, double)
        else:
            table = table_from(totals, *kind, double)
    divisor, scale = None, float(loss_weight)
    if reduction == "mean":
        if avg_factor is None:
            divisor = table[-1]
        elif isinstance(avg_factor, Tensor):
            divisor = avg_factor
        else:
            scale /= float(avg_factor)
    gradient = (
        reduction != "none"
        and pred.requires_grad
        and torch.is_grad_enabled()
        and _losses.gradient_with_loss(pred.dtype)
    )
    result: Tensor = Ghm.apply(
        pred, target, label_weight, table, divisor, scale, *kind, reduction != "none",
        gradient,
    )  # fmt: skip
    return result


def _check(pred: Tensor, target: Tensor, label_weight: Tensor | None, mu: float | None) -> None:
    _checks.tensor("pred", pred)
    _checks.dtype("pred", pred)
    _checks.tensor("target", target)
    _checks.same_device("target", target, "pred", pred)
    shape, rows = tuple(pred.shape), tuple(pred.shape[:-1])
    if mu is None and target.dim() == pred.dim() - 1:
        _checks.dtype("target (of labels)", target, _checks.INTEGERS)
        if tuple(target.shape) != rows:
            raise ValueError(
                f"target, of labels, must have the shape of pred without its last dimension, "
                f"{rows}, got {tuple(target.shape)}"
            )
    else:
        accepted = (*_checks.FLOATS, torch.bool, *_checks.INTEGERS)
        _checks.dtype("target", target, accepted if mu is None else _checks.FLOATS)
        if tuple(target.shape) != shape:
            labels = f" or, of labels, {rows}" if mu is None and shape else ""
            raise ValueError(
                f"target must have the shape of pred, {shape}{labels}, got {tuple(target.shape)}"
            )
    if label_weight is not None:
        _checks.tensor("label_weight", label_weight)
        accepted = (*_checks.FLOATS, torch.bool, *_checks.INTEGERS)
        _checks.dtype("label_weight", label_weight, accepted)
        _checks.same_device("label_weight", label_weight, "pred", pred)
        if tuple(label_weight.shape) not in (shape, rows):
            raise ValueError(
                f"label_weight must have shape {rows} or {shape}, got {tuple(label_weight.shape)}"
            )
    for name, constant in (("target", target), ("label_weight", label_weight)):
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient (it gets none): detach it")


def check_options(
    mu: float | None, bins: int, momentum: float, reduction: str, loss_weight: float
) -> None:
    if mu is not None:
        _checks.number("mu", mu, 1e-30, 1e30, "in [1e-30, 1e30]")
    _checks.integer("bins", bins, 1, _MOST_BINS, f"an integer in [1, {_MOST_BINS}]")
    _checks.number("momentum", momentum, 0, 1 - 2**-53, "in [0, 1)")
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.number("loss_weight", loss_weight, float("-inf"), float("inf"), "finite")


def _check_state(
    pred: Tensor, bins: int, momentum: float, acc_sum: Tensor | None, steps: Tensor | None
) -> None:
    if momentum > 0 and acc_sum is None:
        raise ValueError(f"acc_sum must be a tensor of [{bins}] for momentum={momentum}, got None")
    floats, integers = (torch.float32, torch.float64), (torch.int64,)
    for name, value, dtypes in (
        ("acc_sum", acc_sum, floats),
        ("bias_correction", steps, integers),
    ):
        if value is None:
            continue
        _checks.tensor(name, value)
        _checks.dtype(name, value, dtypes)
        _checks.same_device(name, value, "pred", pred)
        if tuple(value.shape) != (bins,) or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, of shape ({bins},), got {tuple(value.shape)} with "
                f"strides {value.stride()}"
            )
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it is updated in place")


def _check_avg_factor(avg_factor: float | Tensor | None, pred: Tensor, reduction: str) -> None:
    if avg_factor is None:
        return
    if reduction != "mean":
        raise ValueError(f"avg_factor needs reduction='mean', got reduction={reduction!r}")
    if not isinstance(avg_factor, Tensor):
        _checks.number("avg_factor", avg_factor, 2**-1074, float("inf"), "above 0 and finite")
        return
    _checks.dtype("avg_factor", avg_factor, (*_checks.INTEGERS, *_checks.FLOATS))
    _checks.same_device("avg_factor", avg_factor, "pred", pred)
    if avg_factor.numel() != 1:
        raise ValueError(f"avg_factor must have one element, got shape {tuple(avg_factor.shape)}")
    if avg_factor.requires_grad and torch.is_grad_enabled():
        raise ValueError("avg_factor must not require a gradient (it gets none): detach it")
