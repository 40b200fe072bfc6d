"""Sigmoid focal loss: the public function, its autograd and its launchers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
from torch import Tensor

from . import _autograd, _checks, _dispatch
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


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: Literal["none", "mean", "sum"] = "none",
    *,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Focal loss :math:`-\alpha_t (1 - p_t)^\gamma \log p_t` of independent binary logits.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5. A drop-in for
    ``torchvision.ops.sigmoid_focal_loss`` that takes integer labels as well, and that stays finite,
    with a finite gradient, for every finite logit, dtype and ``gamma``.

    Args:
        inputs: logits [..., C], fp16, bf16, fp32 or fp64, any strides.
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
        "none": [..., C] in the dtype of ``inputs``. "sum" and "mean": a scalar, fp32 (fp64 for
        fp64 ``inputs``), 0 for empty ``inputs``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, named
            in the message with its value; ``avg_factor`` without "mean"; ``targets``, ``weight`` or
            ``avg_factor`` that require a gradient, for they are constants of the loss.

    The arithmetic is fp32 (fp64 for fp64). An infinite or NaN logit spoils its own loss
    and gradient, no others; under ``ignore_index`` not even that. Bitwise deterministic. Nothing is
    synchronised with the host. Differentiating twice raises.
    """
    _check(inputs, targets, weight)
    if alpha is not None and alpha != -1:
        _checks.number("alpha", alpha, 0, 1, "in [0, 1], or -1 or None for no alpha")
    _checks.number("gamma", gamma, 0, 1e6, "in [0, 1e6]")
    _checks.number("label_smoothing", label_smoothing, 0, 1 - 2**-53, "in [0, 1)")
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1, "a 64-bit integer")
    _check_avg_factor(avg_factor, inputs, reduction)

    loss: Tensor = _SigmoidFocal.apply(  # type: ignore[no-untyped-call]
        inputs,
        targets,
        weight,
        None if alpha is None or alpha == -1 else float(alpha),
        float(gamma),
        int(ignore_index),
        float(label_smoothing),
        reduction != "none",
    )
    if reduction != "mean":
        return loss
    if isinstance(avg_factor, Tensor):
        return loss / avg_factor.reshape(()).to(loss.dtype)
    return loss / (max(inputs.numel(), 1) if avg_factor is None else avg_factor)


def _check(inputs: Tensor, targets: Tensor, weight: Tensor | None) -> None:
    _checks.tensor("inputs", inputs)
    _checks.dtype("inputs", inputs)
    _checks.tensor("targets", targets)
    _checks.same_device("targets", targets, "inputs", inputs)
    shape, rows = tuple(inputs.shape), tuple(inputs.shape[:-1])
    if targets.dtype in _checks.INTEGERS:
        if not shape or tuple(targets.shape) != rows:
            raise ValueError(
                f"integer targets are labels and must have the shape of inputs without its last "
                f"dimension, {rows}, got {tuple(targets.shape)}; for dense targets of shape "
                f"{shape} pass bool or floating point"
            )
    else:
        _checks.dtype("targets", targets, (*_checks.INTEGERS, torch.bool, *_checks.FLOATS))
        if tuple(targets.shape) != shape:
            raise ValueError(
                f"dense targets must have the shape of inputs, {shape}, got {tuple(targets.shape)}"
            )
    if weight is not None:
        _checks.tensor("weight", weight)
        _checks.dtype("weight", weight)
        _checks.same_device("weight", weight, "inputs", inputs)
        if tuple(weight.shape) not in (shape, rows):
            raise ValueError(f"weight must have shape {rows} or {shape}, got {tuple(weight.shape)}")
    for name, constant in (("targets", targets), ("weight", weight)):
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient (it gets none): detach it")


def _check_avg_factor(avg_factor: float | Tensor | None, inputs: Tensor, reduction: str) -> None:
    if avg_factor is None:
        return
    if reduction != "mean":
        raise ValueError(f"avg_factor needs reduction='mean', got reduction={reduction!r}")
    if not isinstance(avg_factor, Tensor):
        _checks.number("avg_factor", avg_factor, 2**-1074, float("inf"), "above 0 and finite")
        return
    _checks.dtype("avg_factor", avg_factor, (*_checks.INTEGERS, *_checks.FLOATS))
    _checks.same_device("avg_factor", avg_factor, "inputs", inputs)
    if avg_factor.numel() != 1:
        raise ValueError(f"avg_factor must have one element, got shape {tuple(avg_factor.shape)}")
    if avg_factor.requires_grad and torch.is_grad_enabled():
        raise ValueError("avg_factor must not require a gradient (it gets none): detach it")


class _SigmoidFocal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        alpha: float | None,
        gamma: float,
        ignore_index: int,
        label_smoothing: float,
        reduce: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs, targets, weight)
        ctx.options = (alpha, gamma, ignore_index, label_smoothing)
        return _fwd(inputs, targets, weight, *ctx.options, reduce)

    @staticmethod
    @_autograd.once_differentiable("sigmoid_focal_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, targets, weight = ctx.saved_tensors
        dx = _bwd(grad, inputs, targets, weight, *ctx.options)
        return dx, None, None, None, None, None, None, None


def _alloc_loss(inputs: Tensor, reduce: bool) -> Tensor:
    if reduce:
        return inputs.new_empty((), dtype=_dispatch.compute_dtype(inputs.dtype))
    return inputs.new_empty(inputs.shape)


def _alloc_dx(inputs: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape)


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
    settings = FWD.on(inputs)
    programs = triton.cdiv(n, settings["BLOCK"])
    out = loss.new_empty(programs) if reduce else loss
    _dispatch.launch(
        focal_fwd_kernel,
        (programs,),
        inputs.contiguous(),
        targets.contiguous(),
        None if weight is None else weight.contiguous(),
        out,
        n,
        inputs.shape[-1] if inputs.dim() else 1,
        REDUCE=reduce,
        enable_fp_fusion=True,
        **_constants(inputs, targets, weight, alpha, gamma, ignore_index, label_smoothing),
        **settings,
    )
    return out.sum() if reduce else loss


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
    dx = _alloc_dx(inputs)
    if n == 0:
        return dx
    settings = BWD.on(inputs)
    # The gradient of a sum arrives as one number, or as one number expanded: read it in place.
    scalar = not any(grad.stride())
    _dispatch.launch(
        focal_bwd_kernel,
        (triton.cdiv(n, settings["BLOCK"]),),
        inputs.contiguous(),
        targets.contiguous(),
        None if weight is None else weight.contiguous(),
        grad if scalar else grad.contiguous(),
        dx,
        n,
        inputs.shape[-1] if inputs.dim() else 1,
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
    return _dispatch.from_numpy(loss, inputs.dtype)


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
    return torch.where(dx == 0, dx, dx * grad).to(inputs.dtype)


_fwd = _dispatch.register(
    "focal_fwd(Tensor inputs, Tensor targets, Tensor? weight, float? alpha, float gamma, "
    "int ignore_index, float label_smoothing, bool reduce) -> Tensor",
    _launch_fwd,
    _reference_fwd,
    lambda inputs, *others: _alloc_loss(inputs, reduce=others[-1]),
)
_bwd = _dispatch.register(
    "focal_bwd(Tensor grad, Tensor inputs, Tensor targets, Tensor? weight, float? alpha, "
    "float gamma, int ignore_index, float label_smoothing) -> Tensor",
    _launch_bwd,
    _reference_bwd,
    lambda grad, inputs, *_: _alloc_dx(inputs),
)
