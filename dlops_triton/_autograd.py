"""Backward passes that can be differentiated once, and say so the second time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _NotTwice(torch.autograd.Function):
    """A copy of a gradient, tied to what it depends on, without a derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} can be differentiated once only, not twice")


def once_differentiable(name: str = "") -> Callable[[Backward], Backward]:
    """Decorate the backward of an ``autograd.Function`` whose gradient has no derivative.

    ``name`` is that of the op, for the message; that of several ops is in ``ctx.op``.

    Under ``create_graph`` torch's own decorator lets the second derivative vanish in silence where
    the incoming gradient is a constant. This one raises whenever it is asked for.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return gradients
            depends_on = [t for t in (*grads, *ctx.saved_tensors) if t is not None]
            return tuple(
                None if g is None else _NotTwice.apply(name or ctx.op, g, *depends_on)  # type: ignore[no-untyped-call]
                for g in gradients
            )

        return wrapper

    return decorate
