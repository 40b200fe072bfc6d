"""Sigmoid focal loss: the public function, its autograd and its launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import _autograd, _checks, _dispatch, _losses, _vmap
from ._focal_sum import FocalSum
from ._settings import Settings
from .kernels.focal import NONE, PER_ELEMENT, PER_ROW, focal_bwd_kernel, focal_fwd_kernel
from .reference import focal as reference

# The defaults are chosen for what stays in registers.
FWD = Settings(
    "focal_fwd", fp32={"BLOCK": 1024, "num_warps": 4}, fp64={"BLOCK": 512, "num_warps": 4}
)
BWD = Settings(
    "focal_bwd", fp32={"BLOCK": 1024, "num_warps": 4}, fp64={"BLOCK": 512, "num_warps": 4}
)


# The fast path counts a row's elements in 32 bits.
_MOST_CLASSES = 1 << 23


def sigmoid_focal_loss(
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: Literal["none", "mean", "sum"] = "none",
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    r"""Focal loss :math:`-\alpha_t (1 - p_t)^\gamma \log p_t` of independent binary logits.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5. A drop-in for
    ``torchvision.ops.sigmoid_focal_loss`` that takes integer labels as well, and that stays finite,
    with a finite gradient, for every finite logit, dtype and ``gamma``.

    Args:
        inputs: logits [..., C], fp16, bf16, fp32 or fp64, any strides. A head's [N, A * C, H, W],
            viewed as [N, A, C, H, W] and permuted to [N, H, W, A, C], is read in place. Or a list,
            one tensor per level of a feature pyramid: the loss is then that of all rows of all
            levels, which are not concatenated. ``targets`` and ``weight`` are lists as well. Or a
            DTensor sharded by rows, and so ``targets`` and ``weight``: the loss is one as well,
            sharded alike or a partial sum.
        targets: either the shape of ``inputs``, bool or floating point in [0, 1] (soft targets
            follow torchvision's formula, and what lies outside is clamped); or integer labels of
            shape ``inputs.shape[:-1]``, where a label in [0, C) is the positive class,
            ``ignore_index`` gives the row no loss and no gradient, and any other label (C, -1, ...)
            is background.
        alpha: weight of the positives, in [0, 1], the negatives' being ``1 - alpha``; None or -1
            weighs neither.
        gamma: focusing exponent, in [0, 1e6]. At 0 this is binary cross-entropy with logits. Each
            set of hyperparameters compiles its own kernel.
        reduction: "none", "sum", or "mean": the sum over ``avg_factor``, else over all elements,
            ignored ones included.
        weight: factor per sample, of shape ``inputs.shape[:-1]``, or per element.
        avg_factor: divisor of "mean", a positive number or a tensor of one element, which is not
            read on the host (so a zero there is not caught).
        ignore_index: the label without loss. Not used with dense targets.
        label_smoothing: epsilon in [0, 1); targets become ``t (1 - epsilon) + epsilon / 2``.

    Returns:
        "none": [..., C] in the dtype of ``inputs``, of levels a list. "sum" and "mean": a scalar,
        fp32 (fp64 for fp64 ``inputs``), 0 for empty ``inputs``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, named
            in the message with its value; ``avg_factor`` without "mean"; ``targets``, ``weight`` or
            ``avg_factor`` that require a gradient, for they are constants of the loss.

    The arithmetic is fp32 (fp64 for fp64). An infinite or NaN logit spoils its own loss
    and gradient, no others; under ``ignore_index`` not even that. Bitwise deterministic. Nothing is
    synchronised with the host. Differentiating twice raises.

    Labels without ``weight`` and smoothing, reduced, are the fast path: one launch computes loss
    and gradient, for each level; backward multiplies the gradient in place, or moves nothing where
    the incoming one is 1. In fp16, where a scaled gradient could underflow, and under torch.compile
    backward computes the gradient instead. Logits of half precision have a loss exact to 1e-5.
    """
    if _checks.distributed(inputs):
        return _sharded(
            inputs, targets, weight, avg_factor, reduction, alpha=alpha, gamma=gamma,
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
    levels = isinstance(inputs, (list, tuple))
    logits, labels, weights = _levels(inputs, targets, weight)
    if alpha is not None and alpha != -1:
        _checks.number("alpha", alpha, 0, 1, "in [0, 1], or -1 or None for no alpha")
    _checks.number("gamma", gamma, 0, 1e6, "in [0, 1e6]")
    _checks.number("label_smoothing", label_smoothing, 0, 1 - 2**-53, "in [0, 1)")
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1, "a 64-bit integer")
    _checks.avg_factor(avg_factor, logits[0], reduction)

    alpha = None if alpha is None or alpha == -1 else float(alpha)
    options = (alpha, float(gamma), int(ignore_index))
    divisor = avg_factor
    if reduction == "mean" and avg_factor is None:
        divisor = max(sum(x.numel() for x in logits), 1)
    if (
        reduction != "none"
        and label_smoothing == 0
        and weight is None
        and all(t.dtype in _checks.INTEGERS for t in labels)
        and logits[0].shape[-1] <= _MOST_CLASSES
    ):
        early = _losses.gradient_with_loss(logits[0].dtype)
        gradient = early and torch.is_grad_enabled() and any(x.requires_grad for x in logits)
        # Folded into the gradient, where that comes with the loss; autograd does it otherwise.
        if divisor is not None and early:
            on_device = isinstance(divisor, Tensor)
            tensor, scale = (divisor, 1.0) if on_device else (None, 1 / divisor)
            divisor = None
        else:
            tensor, scale = None, 1.0
        loss = FocalSum.apply(options, tensor, scale, gradient, *logits, *labels)
    else:
        losses = [
            _SigmoidFocal.apply(x, t, w, *options, float(label_smoothing), reduction != "none")
            for x, t, w in zip(logits, labels, weights, strict=True)
        ]
        if reduction == "none":
            return losses if levels else losses[0]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    if divisor is None:
        return loss
    return loss / (divisor.reshape(()).to(loss.dtype) if isinstance(divisor, Tensor) else divisor)


def _sharded(
    inputs: Any, targets: Any, weight: Any, avg_factor: Any, reduction: str, **options: Any
) -> Any:
    """The loss of a DTensor, by rows."""
    from . import _distributed

    rows = _distributed.Rows("inputs", inputs, -1)
    divisor = _distributed.whole(avg_factor)
    if reduction == "mean" and divisor is None:
        divisor = max(inputs.numel(), 1)
    loss = sigmoid_focal_loss(
        *(rows.local("inputs", inputs), rows.local("targets", targets)),
        weight=rows.local("weight", weight),
        avg_factor=divisor,
        reduction=reduction,  # type: ignore[arg-type]
        **options,
    )
    return rows.loss(loss, inputs.shape if reduction == "none" else None)


def _levels(
    inputs: Any, targets: Any, weight: Any
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    """Inputs, targets and weights of one or more levels, checked."""
    if not isinstance(inputs, (list, tuple)):
        _check(inputs, targets, weight)
        return [inputs], [targets], [weight]
    if not inputs:
        raise ValueError("inputs must be a tensor or a list of at least one, got an empty list")
    for name, value in (("targets", targets), ("weight", weight)):
        if value is None and name == "weight":
            weight = [None] * len(inputs)
        elif not isinstance(value, (list, tuple)) or len(value) != len(inputs):
            got = f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
            raise ValueError(
                f"{name} must be a list of {len(inputs)} tensors, as inputs is one, got {got}"
            )
    for i, level in enumerate(zip(inputs, targets, weight, strict=True)):
        _check(*level, at=f"[{i}]")
        first, x = inputs[0], inputs[i]
        if (x.dtype, x.device, x.shape[-1:]) != (first.dtype, first.device, first.shape[-1:]):
            raise ValueError(
                f"inputs[{i}] must have the dtype, device and classes of inputs[0], {first.dtype}, "
                f"{first.device}, {tuple(first.shape[-1:])}, got {x.dtype}, {x.device}, "
                f"{tuple(x.shape[-1:])}"
            )
    return inputs, targets, weight


def _check(inputs: Tensor, targets: Tensor, weight: Tensor | None, at: str = "") -> None:
    _checks.tensor(f"inputs{at}", inputs)
    _checks.dtype(f"inputs{at}", inputs)
    _checks.tensor(f"targets{at}", targets)
    _checks.same_device(f"targets{at}", targets, f"inputs{at}", inputs)
    shape, rows = tuple(inputs.shape), tuple(inputs.shape[:-1])
    if targets.dtype in _checks.INTEGERS:
        if not shape or tuple(targets.shape) != rows:
            raise ValueError(
                f"integer targets{at} are labels and must have the shape of inputs without its "
                f"last dimension, {rows}, got {tuple(targets.shape)}; for dense targets of shape "
                f"{shape} pass bool or floating point"
            )
    else:
        _checks.dtype(f"targets{at}", targets, (*_checks.INTEGERS, torch.bool, *_checks.FLOATS))
        if tuple(targets.shape) != shape:
            raise ValueError(
                f"dense targets{at} must have the shape of inputs, {shape}, "
                f"got {tuple(targets.shape)}"
            )
    if weight is not None:
        _checks.tensor(f"weight{at}", weight)
        _checks.dtype(f"weight{at}", weight)
        _checks.same_device(f"weight{at}", weight, f"inputs{at}", inputs)
        if tuple(weight.shape) not in (shape, rows):
            raise ValueError(
                f"weight{at} must have shape {rows} or {shape}, got {tuple(weight.shape)}"
            )
    for name, constant in (("targets", targets), ("weight", weight)):
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}{at} must not require a gradient (it gets none): detach it")


class _SigmoidFocal(_autograd.Function):
    """``apply(inputs, targets, weight, alpha, gamma, ignore_index, label_smoothing, reduce)``."""

    @staticmethod
    def keep(ctx: Any, *args: Any) -> None:
        ctx.save_for_backward(*args[:3])
        ctx.options = args[3:-1]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _SigmoidFocal.keep(ctx, *args)
        return _fwd(*args)

    @staticmethod
    @_autograd.once_differentiable("sigmoid_focal_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, targets, weight = ctx.saved_tensors
        dx = _bwd(grad, inputs, targets, weight, *ctx.options)
        return dx, None, None, None, None, None, None, None


def _alloc_loss(inputs: Tensor, reduce: bool) -> Tensor:
    if reduce:
        return inputs.new_empty((), dtype=_dispatch.compute_dtype(inputs.dtype))
    return torch.empty_like(inputs)


def _arguments(
    layout: _losses.ByClass, targets: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, targets and weight in the order of the logits' memory."""
    if layout.classes * layout.inner > 1 << 30 and layout.inner > 1:
        raise ValueError(
            f"inputs must have at most 2**30 logits between two images where the classes are not "
            f"last in memory, got {layout.classes * layout.inner}: pass inputs.contiguous()"
        )

    def ordered(t: Tensor) -> Tensor:
        dense = t.shape == layout.logits.shape
        return layout.per_element(t) if dense else layout.per_row(t)

    return layout.logits, ordered(targets), None if weight is None else ordered(weight)


def _constants(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> dict[str, Any]:
    weights = NONE
    if weight is not None:
        weights = PER_ELEMENT if weight.shape == inputs.shape else PER_ROW
    return {
        "ALPHA": alpha,
        "GAMMA": gamma,
        "IGNORE_INDEX": ignore_index,
        "SMOOTHING": label_smoothing,
        "TARGETS": (PER_ROW if targets.dtype in _checks.INTEGERS else PER_ELEMENT).value,
        "WEIGHTS": weights.value,
    }


def _launch_fwd(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
) -> Tensor:
    n = inputs.numel()
    loss = _alloc_loss(inputs, reduce)
    if n == 0:
        return loss.zero_()
    layout = _losses.by_class(inputs, -1)
    settings = FWD.on(inputs)
    programs = _dispatch.cdiv(n, settings["BLOCK"])
    partial = reduce and programs > 1
    out = loss.new_empty(programs) if partial else loss
    _dispatch.launch(
        focal_fwd_kernel,
        (programs,),
        *_arguments(layout, targets, weight),
        out,
        n,
        layout.classes,
        layout.inner,
        REDUCE=reduce,
        enable_fp_fusion=True,
        **_constants(inputs, targets, weight, alpha, gamma, ignore_index, label_smoothing),
        **settings,
    )
    return out.sum() if partial else loss


def _launch_bwd(
    grad: Tensor,
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    n = inputs.numel()
    dx = torch.empty_like(inputs)
    if n == 0:
        return dx
    layout = _losses.by_class(inputs, -1)
    settings = BWD.on(inputs)
    # The gradient of a sum arrives as one number, or as one number expanded: read it in place.
    scalar = not any(grad.stride())
    _dispatch.launch(
        focal_bwd_kernel,
        (_dispatch.cdiv(n, settings["BLOCK"]),),
        *_arguments(layout, targets, weight),
        grad if scalar else layout.per_element(grad),
        dx,
        n,
        layout.classes,
        layout.inner,
        SCALAR_GRAD=scalar,
        enable_fp_fusion=True,
        **_constants(inputs, targets, weight, alpha, gamma, ignore_index, label_smoothing),
        **settings,
    )
    return dx


def _reference_fwd(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
) -> Tensor:
    loss = reference.sigmoid_focal_loss(
        _dispatch.to_numpy(inputs),
        _dispatch.to_numpy(targets),
        alpha,
        gamma,
        weight=None if weight is None else _dispatch.to_numpy(weight),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    if reduce:
        return _dispatch.from_numpy(loss.sum(), _dispatch.compute_dtype(inputs.dtype))
    return _alloc_loss(inputs, reduce).copy_(_dispatch.from_numpy(loss, torch.float64))


def _reference_bwd(
    grad: Tensor,
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    derivative = reference.sigmoid_focal_loss_grad(
        _dispatch.to_numpy(inputs),
        _dispatch.to_numpy(targets),
        alpha,
        gamma,
        weight=None if weight is None else _dispatch.to_numpy(weight),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    dx = _dispatch.from_numpy(derivative, torch.float64)
    # No gradient stays none, whatever comes from above: 0 times infinity would not.
    return torch.empty_like(inputs).copy_(torch.where(dx == 0, dx, dx * grad))


_fwd = _dispatch.register(
    "focal_fwd(Tensor inputs, Tensor targets, Tensor? weight, float? alpha, float gamma, "
    "int ignore_index, float label_smoothing, bool reduce) -> Tensor",
    _launch_fwd,
    _reference_fwd,
    lambda inputs, *others: _alloc_loss(inputs, reduce=others[-1]),
    vmap=_vmap.leading(3, lambda first, *others: not others[-1]),
)
_bwd = _dispatch.register(
    "focal_bwd(Tensor grad, Tensor inputs, Tensor targets, Tensor? weight, float? alpha, "
    "float gamma, int ignore_index, float label_smoothing) -> Tensor",
    _launch_bwd,
    _reference_bwd,
    lambda grad, inputs, *_: torch.empty_like(inputs),
    # Of a loss that is reduced the gradient has no dimensions.
    vmap=_vmap.leading(4, lambda first, *_: first[0].shape == first[1].shape),
)
