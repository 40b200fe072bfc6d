"""Softmax focal loss: the public function, its autograd and its launchers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _autograd, _checks, _dispatch, _losses
from ._settings import Settings
from .kernels.softmax_focal import softmax_focal_kernel, softmax_focal_long_kernel
from .reference import softmax_focal as reference

SHORT = Settings("softmax_focal", fp32={"num_warps": 4})
LONG = Settings("softmax_focal_long", fp32={"BLOCK": 2048, "num_warps": 8})

# Most classes of a row that is kept in registers: contiguous ones, and ones that are strided, of
# which several rows are read beside one another.
_MOST, _MOST_STRIDED = 4096, 256
_STRIDED_ROWS = 64  # beyond that


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    *,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Focal loss :math:`-\alpha_y (1 - p_y)^\gamma \log p_y` of a softmax over classes.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, in its multi-class form. With
    ``gamma=0`` and no ``alpha`` this is ``torch.nn.functional.cross_entropy`` of class indices, in
    every option the two share.

    Args:
        inputs: logits [N, C], [N, C, d1, ...] or [C], fp16, bf16, fp32 or fp64, any strides:
            channels-last memory and permuted heads are read in place. -inf masks a class. Or a
            DTensor, sharded by other dimensions than C, with one for ``targets`` and one per sample
            for ``weight``: the loss is one as well, sharded alike or a partial sum.
        targets: integer labels [N], [N, d1, ...] or []. One outside [0, C) has no loss and no
            gradient, whether it is ``ignore_index`` or not, and does not count for the mean.
        alpha: None, a factor >= 0 of every loss, or one for each class [C].
        gamma: focusing exponent, in [0, 1e6].
        reduction: "none", "sum", or "mean": the sum over ``avg_factor``, else over the number of
            targets that count or, with ``weight``, over the sum of their weights.
        weight: per class [C], as ``F.cross_entropy`` has it, or per sample, of the shape of
            ``targets``. A shape that is both is taken per class.
        avg_factor: divisor of "mean", a positive number or a tensor of one element, which is not
            read on the host (so a zero there is not caught).
        ignore_index: the label without loss.
        label_smoothing: epsilon in [0, 1), as ``F.cross_entropy`` has it; ``alpha`` and
            ``(1 - p_y)**gamma`` multiply the smoothed cross-entropy.

    Returns:
        "none": the shape of ``targets``, in the dtype of ``inputs``. "sum" and "mean": a scalar,
        fp32 (fp64 for fp64 ``inputs``), 0 where no target counts.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, named
            in the message with its value; ``avg_factor`` without "mean"; ``alpha``, ``weight`` or
            ``avg_factor`` that require a gradient, for they are constants of the loss.

    The arithmetic is fp32 (fp64 for fp64). An infinite or NaN logit spoils its own row, and where
    the row does not count, nothing. Bitwise deterministic. Nothing is synchronised with the host.
    Differentiating twice raises. Reduced, one launch computes loss and gradient; see
    :func:`sigmoid_focal_loss`.
    """
    if _checks.distributed(inputs):
        return _sharded(
            inputs, targets, alpha, weight, avg_factor, reduction, ignore_index,
            gamma=gamma, label_smoothing=label_smoothing,
        )  # fmt: skip
    _check(inputs, targets, alpha, weight)
    _checks.number("gamma", gamma, 0, 1e6, "in [0, 1e6]")
    _checks.number("label_smoothing", label_smoothing, 0, 1 - 2**-53, "in [0, 1)")
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1, "a 64-bit integer")
    _checks.avg_factor(avg_factor, inputs, reduction)
    shape = targets.shape
    if inputs.dim() == 1:
        inputs, targets = inputs[None], targets[None]
        if weight is not None and not weight.dim():
            weight = weight[None]

    per_class = weight is not None and weight.shape == inputs.shape[1:2]
    row_weight = None if per_class else weight
    table = _table(inputs, alpha, weight if per_class else None)
    divisor = None
    if reduction == "mean":
        divisor = _divisor(avg_factor, inputs, targets, weight, per_class, ignore_index)
    fold = reduction != "none" and _losses.gradient_with_loss(inputs.dtype)
    loss: Tensor = _SoftmaxFocal.apply(
        inputs,
        targets,
        table,
        row_weight,
        divisor if fold else None,
        float(gamma),
        int(ignore_index),
        float(label_smoothing),
        reduction != "none",
        fold and inputs.requires_grad and torch.is_grad_enabled(),
    )
    if reduction == "none":
        return loss.reshape(shape)
    return loss if fold or divisor is None else loss / divisor.to(loss.dtype)


def _sharded(
    inputs: Any,
    targets: Any,
    alpha: Any,
    weight: Any,
    avg_factor: Any,
    reduction: str,
    ignore_index: int,
    **options: Any,
) -> Any:
    """The loss of a DTensor, by rows."""
    from . import _distributed

    rows = _distributed.Rows("inputs", inputs, min(1, inputs.dim() - 1))
    x, t = rows.local("inputs", inputs), rows.local("targets", targets)
    if weight is not None:
        per_class = weight.shape == inputs.shape[1:2]
        weight = _distributed.whole(weight) if per_class else rows.local("weight", weight)
    else:
        per_class = False
    divisor = _distributed.whole(avg_factor)
    if reduction == "mean" and divisor is None:
        divisor = _not_zero(rows.total(_total(x, t, weight, per_class, ignore_index)))
    loss = softmax_focal_loss(
        x, t, _distributed.whole(alpha), reduction=reduction, weight=weight,  # type: ignore[arg-type]
        avg_factor=divisor, ignore_index=ignore_index, **options,
    )  # fmt: skip
    return rows.loss(loss, targets.shape if reduction == "none" else None)


def _table(inputs: Tensor, alpha: float | Tensor | None, weight: Tensor | None) -> Tensor | None:
    """[2, C]: alpha and the weight of each class; None where all are 1."""
    if alpha is None and weight is None:
        return None
    one = inputs.new_ones(inputs.shape[1], dtype=_dispatch.compute_dtype(inputs.dtype))
    alphas = one if alpha is None else one * alpha
    return torch.stack([alphas, one if weight is None else one * weight])


def _divisor(
    avg_factor: float | Tensor | None,
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    per_class: bool,
    ignore_index: int,
) -> Tensor:
    """The divisor of the mean, on the device, which nothing waits for."""
    if isinstance(avg_factor, Tensor):
        return avg_factor.reshape(())
    dtype = _dispatch.compute_dtype(inputs.dtype)
    if avg_factor is not None:
        return inputs.new_full((), avg_factor, dtype=dtype)
    total = _total(inputs, targets, weight, per_class, ignore_index)
    return total.clamp(min=1) if weight is None else _not_zero(total)


def _total(
    inputs: Tensor, targets: Tensor, weight: Tensor | None, per_class: bool, ignore_index: int
) -> Tensor:
    """How many targets count, or what they weigh."""
    dtype = _dispatch.compute_dtype(inputs.dtype)
    classes = inputs.shape[1]
    counts = (targets != ignore_index) & (targets >= 0) & (targets < classes)
    if weight is None:
        return counts.sum(dtype=dtype)
    if per_class:
        weight = weight[targets.long().clamp(0, classes - 1)]
    return torch.where(counts, weight.to(dtype), 0).sum()


def _not_zero(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


def _check(
    inputs: Tensor, targets: Tensor, alpha: float | Tensor | None, weight: Tensor | None
) -> None:
    _checks.tensor("inputs", inputs)
    _checks.dtype("inputs", inputs)
    _checks.tensor("targets", targets)
    _checks.same_device("targets", targets, "inputs", inputs)
    shape = tuple(inputs.shape)
    if not shape or shape[min(1, len(shape) - 1)] == 0:
        raise ValueError(f"inputs must have shape [N, C, ...] or [C] with C >= 1, got {shape}")
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[1] if len(shape) > 1 else shape[0]
    if targets.dtype not in _checks.INTEGERS:
        _checks.dtype("targets", targets, _checks.INTEGERS)
    if tuple(targets.shape) != rows:
        raise ValueError(
            f"targets must have the shape of inputs without the classes, {rows}, "
            f"got {tuple(targets.shape)}"
        )
    if isinstance(alpha, Tensor):
        _checks.dtype("alpha", alpha)
        _checks.same_device("alpha", alpha, "inputs", inputs)
        if tuple(alpha.shape) != (classes,):
            raise ValueError(
                f"alpha must be a number or have shape {(classes,)}, got {tuple(alpha.shape)}"
            )
    elif alpha is not None:
        _checks.number("alpha", alpha, 0, float("inf"), "at least 0 and finite")
    if weight is not None:
        _checks.tensor("weight", weight)
        _checks.dtype("weight", weight)
        _checks.same_device("weight", weight, "inputs", inputs)
        if tuple(weight.shape) not in ((classes,), rows):
            raise ValueError(
                f"weight must have shape {(classes,)} or {rows}, got {tuple(weight.shape)}"
            )
    for name, constant in (("alpha", alpha), ("weight", weight)):
        if isinstance(constant, Tensor) and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient (it gets none): detach it")


class _SoftmaxFocal(_autograd.Function):
    """``apply`` of the five tensors, the three options, whether to reduce, and to find the gradient
    with the loss."""

    @staticmethod
    def keep(ctx: Any, *args: Any) -> None:
        ctx.save_for_backward(*args[:5])
        ctx.options = args[5:8]
        ctx.reduce, ctx.with_loss = args[8:]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _SoftmaxFocal.keep(ctx, *args)
        loss, dx = _op(*args[:-1], True, args[-1])
        ctx.gradients = [dx]
        return loss

    @staticmethod
    @_autograd.once_differentiable("softmax_focal_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, targets, table, row_weight, divisor = ctx.saved_tensors

        def compute(grad: Tensor | None) -> list[Tensor]:
            factor = divisor
            if grad is not None:
                factor = (1 if divisor is None else divisor) / grad if ctx.reduce else grad
            given = (inputs, targets, table, row_weight, factor, *ctx.options, ctx.reduce)
            return [_op(*given, False, True)[1]]

        (dx,) = _losses.gradients_of(ctx, grad, compute)
        return dx, None, None, None, None, None, None, None, None, None


def _alloc(
    inputs: Tensor, targets: Tensor, reduce: bool, with_loss: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient; empty where not asked for."""
    if reduce:
        loss = inputs.new_empty((), dtype=_dispatch.compute_dtype(inputs.dtype))
    else:
        loss = inputs.new_empty(targets.shape if with_loss else 0)
    return loss, torch.empty_like(inputs) if with_grad else inputs.new_empty(0)


def _launch(
    inputs: Tensor,
    targets: Tensor,
    table: Tensor | None,
    row_weight: Tensor | None,
    factor: Tensor | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    with_loss: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss, dx = _alloc(inputs, targets, reduce, with_loss, with_grad)
    if inputs.numel() == 0:
        return loss.zero_(), dx
    layout = _losses.by_class(inputs, 1)
    columns, classes = layout.inner > 1, layout.classes
    settings = dict(
        (SHORT if classes <= (_MOST_STRIDED if columns else _MOST) else LONG).on(inputs)
    )
    if "BLOCK" in settings:
        kernel = softmax_focal_long_kernel
        rows = settings["ROWS"] = _STRIDED_ROWS if columns else 1
        settings["BLOCK"] = max(settings["BLOCK"] // rows, 1)
    else:
        kernel = softmax_focal_kernel
        settings["BLOCK"] = block = 1 << (min(classes, _MOST // 2).bit_length() - 1)
        settings["REST"] = _dispatch.next_power_of_2(classes - block) if classes > block else 0
        rows = 4096 // block
    num_rows = layout.inner if columns else layout.outer
    grid = (_dispatch.cdiv(num_rows, rows) * (layout.outer if columns else 1),)
    in_order = loss.permute(layout.rows) if with_loss and not reduce else None
    out: Tensor | None = loss.new_empty(1 + grid[0]) if reduce else in_order
    if in_order is not None and not in_order.is_contiguous():
        out = loss.new_empty(in_order.shape)
    if factor is not None and not reduce:
        factor = layout.per_row(factor)
    _dispatch.launch(
        kernel,
        grid,
        layout.logits,
        layout.per_row(targets),
        table,
        None if row_weight is None else layout.per_row(row_weight),
        factor,
        dx if with_grad else None,
        out,
        _dispatch.counter(inputs.device) if reduce else None,
        num_rows,
        classes,
        GAMMA=gamma,
        IGNORE_INDEX=ignore_index,
        SMOOTHING=label_smoothing,
        COLUMNS=columns,
        enable_fp_fusion=True,
        **settings,
    )
    if reduce and out is not None:
        return out[0], dx
    if in_order is not None and out is not None and out is not in_order:
        in_order.copy_(out)
    return loss, dx


def _reference(
    inputs: Tensor,
    targets: Tensor,
    table: Tensor | None,
    row_weight: Tensor | None,
    factor: Tensor | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    with_loss: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss, dx = _alloc(inputs, targets, reduce, with_loss, with_grad)
    args = (_dispatch.to_numpy(inputs), _dispatch.to_numpy(targets))
    alpha, weight = (None, None) if table is None else _dispatch.to_numpy(table)
    options: dict[str, Any] = {
        "class_weight": weight,
        "sample_weight": None if row_weight is None else _dispatch.to_numpy(row_weight),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    scale = torch.ones((), dtype=torch.float64)
    if factor is not None:
        scale = 1 / factor.double().reshape(()) if reduce else factor.double()[:, None]
    if with_loss:
        each = torch.from_numpy(reference.softmax_focal_loss(*args, alpha, gamma, **options))
        loss.copy_(each.sum() * scale if reduce else each)
    if with_grad:
        slope = reference.softmax_focal_loss_grad(*args, alpha, gamma, **options)
        gradient = torch.from_numpy(slope)
        dx.copy_(torch.where(gradient == 0, 0, gradient * scale))
    return loss, dx


_op = _dispatch.register(
    "softmax_focal(Tensor inputs, Tensor targets, Tensor? table, Tensor? row_weight, "
    "Tensor? factor, float gamma, int ignore_index, float label_smoothing, bool reduce, "
    "bool with_loss, bool with_grad) -> (Tensor, Tensor)",
    _launch,
    _reference,
    lambda inputs, targets, *others: _alloc(inputs, targets, *others[-3:]),
)
