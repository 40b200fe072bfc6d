"""What every autograd.Function of the library shares: torch.func, and one derivative, not two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

Backward = Callable[..., tuple[Tensor | None, ...]]


class Function(torch.autograd.Function):
    """An ``autograd.Function`` that ``torch.func`` and ``torch.vmap`` take as well.

    A class has ``keep``, which saves for backward what it wants of the arguments, and ``forward``,
    which calls it. The transforms want the two apart; but where ``setup_context`` is defined torch
    binds the arguments of every eager call by ``inspect``, 20 us. So they get a copy of the class.
    The eager call is what torch's own ``apply`` comes to, less what that asks about such a class.
    """

    keep: Callable[..., None]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return _for_transforms(cls).apply(*args)
        return super(torch.autograd.Function, cls).apply(  # type: ignore[misc]
            *unwrap_dead_wrappers(args)
        )


@functools.cache
def _for_transforms(function: Any) -> type[torch.autograd.Function]:
    class ForTransforms(torch.autograd.Function):
        generate_vmap_rule = True
        backward = staticmethod(function.backward)

        @staticmethod
        def forward(*args: Any) -> Any:
            return function.forward(SimpleNamespace(save_for_backward=lambda *_: None), *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            function.keep(ctx, *inputs)

        # Dynamo refuses a class that has it, which the one above is to Dynamo.
        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(
                "dlops_triton has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian): "
                "use backward, or torch.func.grad, vjp or jacrev"
            )

    return ForTransforms


class _NotTwice(Function):
    """A copy of a gradient, tied to what it depends on, without a derivative."""

    @staticmethod
    def keep(ctx: Any, name: str, gradient: Tensor, *depends_on: Tensor) -> None:
        ctx.name = name

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        _NotTwice.keep(ctx, name, gradient)
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
                None if g is None else _NotTwice.apply(name or ctx.op, g, *depends_on)
                for g in gradients
            )

        return wrapper

    return decorate
